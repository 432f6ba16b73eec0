"""Making and finding merchants.

A merchant has a row in each schema, and there is no transaction over both: it is made in `glam`
first, where it is unique, then in `cde`. Making the same one again makes what is missing, so that
a crash in between is mended by repeating the command.
"""

import re
from typing import Final, Literal, TypeVar, get_args
from uuid import UUID

import structlog

from glamd.clock import Clock
from glamd.db import Database
from glamd.errors import ConflictError, FieldError, InputError, NotFoundError
from glamd.ids import uuid7
from glamd.merchants import store
from glamd.merchants.store import Merchant, SensitiveData, Settings

T = TypeVar("T")

PLATFORMS: Final = (
    "shopify",
    "woocommerce",
    "bigcommerce",
    "magento",
    "squarespace",
    "custom",
)
DOMAIN_LIMIT: Final = 253
"""Characters of a host name (RFC 1035, 2.3.4, without the root's dot)."""

SHOP_ID_LIMIT: Final = 255
PAGE_LIMIT: Final = 200
TOKEN_TTL_LIMITS_S: Final = (60, 8_760 * 3_600)
"""Seconds that a merchant's tokens may live, at least and at most: a minute to a year."""

log = structlog.get_logger()

_LABEL = r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?"
_DOMAIN = re.compile(rf"{_LABEL}(?:\.{_LABEL})+", re.ASCII)


class Merchants:
    """The merchants of both schemas; `glam` and `cde` may be the same database."""

    def __init__(self, *, glam: Database, cde: Database, clock: Clock) -> None:
        self._glam = glam
        self._cde = cde
        self._clock = clock

    async def create(
        self, *, platform: str, shop_id: str, domain: str, merchant_id: UUID | None = None
    ) -> Merchant:
        """Make a merchant, or give back the same one where all of this is stored already.

        Without an id a new one (UUIDv7) is made, unless the shop is there with this domain. The
        domain is lower-cased. InputError names the fields that are wrong; ConflictError
        MERCHANT_EXISTS those that another merchant has.
        """
        now = self._clock.now()
        wanted = Merchant(
            merchant_id=merchant_id or uuid7(now),
            platform=platform,
            shop_id=shop_id,
            domain=_lower(domain),
            created_at=now,
        )
        _check(wanted)
        added = await store.add(self._glam, wanted)
        merchant = _same(wanted, await store.alike(self._glam, wanted), any_id=merchant_id is None)
        await store.add_to_cde(self._cde, merchant)
        if added:
            log.info("merchant_created", merchant_id=str(merchant.merchant_id))
        return merchant

    async def list(self, *, limit: int = 50, after: UUID | None = None) -> tuple[Merchant, ...]:
        """The next merchants by id, which for our own ids is by age; `limit` 1 to 200."""
        if not 1 <= limit <= PAGE_LIMIT:
            raise InputError(
                "The limit is out of range.",
                fields=(FieldError("limit", f"it is 1 to {PAGE_LIMIT}"),),
            )
        return await store.page(self._glam, limit=limit, after=after)

    async def show(self, merchant_id: UUID) -> Merchant:
        """The merchant with this id; NotFoundError MERCHANT_NOT_FOUND."""
        return _found(await store.by_id(self._glam, merchant_id))

    async def by_domain(self, domain: str) -> Merchant:
        """The merchant with this domain in any case; NotFoundError MERCHANT_NOT_FOUND."""
        domain = _lower(domain)
        return _found(await store.by_domain(self._glam, domain) if _is_domain(domain) else None)

    async def settings(self, merchant_id: UUID) -> Settings:
        """What is set for the merchant's tokens; NotFoundError MERCHANT_NOT_FOUND."""
        return _found(await store.settings(self._cde, merchant_id))

    async def configure(
        self,
        merchant_id: UUID,
        *,
        token_ttl_s: int | Literal["default"] | None = None,
        sensitive_data: SensitiveData | None = None,
    ) -> Settings:
        """Change what is not None, for tokens that are made from now on; the settings after it.

        Sessions on every node have it within seconds. InputError, NotFoundError
        MERCHANT_NOT_FOUND, ConflictError MERCHANT_ERASED.
        """
        _check_settings(token_ttl_s, sensitive_data)
        changed = await store.change_settings(
            self._cde, merchant_id, token_ttl_s=token_ttl_s, sensitive_data=sensitive_data
        )
        if changed is None:
            await self.settings(merchant_id)
            raise ConflictError("The merchant is being erased or was.", code="MERCHANT_ERASED")
        log.info(
            "merchant_configured",
            merchant_id=str(merchant_id),
            token_ttl_s=changed.token_ttl_s,
            sensitive_data=changed.sensitive_data,
        )
        return changed


def _check_settings(token_ttl_s: int | str | None, sensitive_data: str | None) -> None:
    wrong = []
    low, high = TOKEN_TTL_LIMITS_S
    if isinstance(token_ttl_s, int) and not low <= token_ttl_s <= high:
        wrong.append(FieldError("token_ttl_s", f"it is {low} to {high} seconds"))
    if sensitive_data is not None and sensitive_data not in get_args(SensitiveData):
        names = " or ".join(get_args(SensitiveData))
        wrong.append(FieldError("sensitive_data", f"it is {names}"))
    if token_ttl_s is None and sensitive_data is None:
        wrong.append(FieldError("token_ttl_s", "or sensitive_data is needed"))
    if wrong:
        raise InputError("The merchant cannot be set to that.", fields=wrong)


def _check(wanted: Merchant) -> None:
    wrong = []
    if wanted.platform not in PLATFORMS:
        wrong.append(FieldError("platform", f"it is one of {', '.join(PLATFORMS)}"))
    if not 1 <= len(wanted.shop_id) <= SHOP_ID_LIMIT or not wanted.shop_id.isprintable():
        wrong.append(FieldError("shop_id", f"it is 1 to {SHOP_ID_LIMIT} printable characters"))
    if not _is_domain(wanted.domain):
        wrong.append(FieldError("domain", "it is a host name with a dot, such as shop.example.com"))
    if wrong:
        names = ", ".join(error.field for error in wrong)
        raise InputError(f"The merchant cannot be made: {names}.", fields=wrong)


def _lower(domain: str) -> str:
    # Beyond ASCII there are letters whose small form is an ASCII one, such as the Kelvin sign.
    return domain.lower() if domain.isascii() else domain


def _is_domain(domain: str) -> bool:
    return len(domain) <= DOMAIN_LIMIT and _DOMAIN.fullmatch(domain) is not None


def _same(wanted: Merchant, there: tuple[Merchant, ...], *, any_id: bool) -> Merchant:
    """The stored merchant if it is what is wanted, or ConflictError with what differs."""
    wrong: dict[str, str] = {}
    for merchant in there:
        if merchant.merchant_id == wanted.merchant_id:
            wrong.update(
                (name, "the merchant with this id has another")
                for name in ("platform", "shop_id", "domain")
                if getattr(merchant, name) != getattr(wanted, name)
            )
            continue
        shop = (merchant.platform, merchant.shop_id) == (wanted.platform, wanted.shop_id)
        domain = merchant.domain == wanted.domain
        if any_id and shop and domain:
            continue
        if shop:
            wrong["shop_id"] = "another merchant has this shop"
        if domain:
            wrong["domain"] = "another merchant has this domain"
    if wrong:
        raise ConflictError(
            f"There is another merchant already: {', '.join(wrong)}.",
            code="MERCHANT_EXISTS",
            fields=[FieldError(name, message) for name, message in wrong.items()],
        )
    return _found(there[0] if there else None)


def _found(found: T | None) -> T:
    if found is None:
        raise NotFoundError("There is no such merchant.", code="MERCHANT_NOT_FOUND")
    return found
