"""Moves every key to the provider, and the key-encryption key, that wraps what is new.

One key after the other, each in a transaction of its own: opened by the provider that its row
names, checked, wrapped anew, read back, and only then written. It may be cut short anywhere and
begun again; what is there already is left alone. Nodes that have keys in memory notice nothing.
"""

import hmac
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Final, Literal, TypeVar

import structlog

from glamd.crypto import dukpt, kcv
from glamd.db import Connection, Database
from glamd.errors import CryptoError, GlamError
from glamd.keys.operations import Operations, Record
from glamd.keys.providers import proven
from glamd.keys.providers.interface import KeyProvider, Providers
from glamd.keys.rewrapping import store
from glamd.keys.rewrapping.store import HeldBdk, WrappedKey

K = TypeVar("K", WrappedKey, HeldBdk)

Outcome = Literal["rewrapped", "current", "stays", "changed", "failed"]
"""What came of one key.

`current`: it was there already. `stays`: a BDK that is an object of an HSM, which no one can take
out. `changed`: somebody else rewrapped or destroyed it at the same moment.
"""

ACTION: Final = "keys.rewrap"

_STAYS: Final = (
    "the BDK is an object of the HSM and cannot leave it; keep its provider in "
    "keys.former_providers, or import the BDK anew under another key set"
)

log = structlog.get_logger()


@dataclass(frozen=True, slots=True, kw_only=True)
class Rewrapped:
    """What came of one key: `payment-tokens:v2`, `bdk:lane-1`."""

    key: str
    outcome: Outcome
    before: str
    provider: str
    reason: str | None = None


@dataclass(frozen=True, slots=True)
class RewrapReport:
    """What came of every key, by name of keyring and key set."""

    provider: str
    keys: tuple[Rewrapped, ...]

    def count(self, outcome: Outcome) -> int:
        """How many keys this came of."""
        return sum(key.outcome == outcome for key in self.keys)


@dataclass(frozen=True, slots=True, kw_only=True)
class ProviderState:
    """One provider: whether it wraps what is new, how many keys it still holds, how it is.

    `trouble` is None where it works. A provider that only rows name has `configured` False.
    """

    name: str
    current: bool
    configured: bool
    keys: int
    trouble: str | None


class Rewrapper:
    """Rewraps the keys of both schemas."""

    def __init__(
        self, *, database: Database, glam: Database, providers: Providers, record: Record
    ) -> None:
        """`glam` is where the data keys of all that is no card data are."""
        self._database = database
        self._glam = glam
        self._providers = providers
        self._operations = Operations(record)

    async def rewrap(self, actor: str) -> RewrapReport:
        """Move what is not there yet; what fails is in the report, and the rest goes on.

        UnavailableError before anything is done where the current provider is away or refuses, and
        in between where the audit or the database is; begin again then.
        """
        await self._providers.health()
        keys = await self._data_keys()
        done = [await self._one(key, self._rewrap_data_key, actor) for key in keys]
        bdks = await store.bdks(self._database)
        done += [await self._one(bdk, self._rewrap_bdk, actor) for bdk in bdks]
        report = RewrapReport(self._providers.current.name, tuple(done))
        log.info(
            "keys_rewrapped",
            provider=report.provider,
            actor=actor,
            outcomes=dict(Counter(key.outcome for key in done)),
        )
        return report

    async def providers(self) -> tuple[ProviderState, ...]:
        """Every provider that is configured or that a key still needs, the current one first."""
        held = Counter(key.provider for key in await self._data_keys())
        held.update(bdk.provider for bdk in await store.bdks(self._database))
        configured = {provider.name: provider for provider in reversed(self._providers.all)}
        states = [
            ProviderState(
                name=name,
                current=provider is self._providers.current,
                configured=True,
                keys=held[name],
                trouble=await _trouble(provider),
            )
            for name, provider in configured.items()
        ]
        unknown = sorted(held.keys() - configured.keys())
        return (
            *states,
            *(
                ProviderState(
                    name=name,
                    current=False,
                    configured=False,
                    keys=held[name],
                    trouble="keys need it, and it is not in keys.former_providers",
                )
                for name in unknown
            ),
        )

    async def _data_keys(self) -> tuple[WrappedKey, ...]:
        card_data = await store.data_keys(self._database, "cde")
        return (*card_data, *await store.data_keys(self._glam, "glam"))

    async def _one(
        self, key: K, move: Callable[[K, str], Awaitable[Outcome]], actor: str
    ) -> Rewrapped:
        current = self._providers.current.name
        try:
            outcome = await move(key, actor)
        except GlamError as error:
            await self._write_down(key.name, actor, error.code)
            log.warning("key_not_rewrapped", key=key.name, code=error.code)
            return Rewrapped(
                key=key.name,
                outcome="failed",
                before=key.provider,
                provider=key.provider,
                reason=error.message,
            )
        stays = outcome == "stays"
        return Rewrapped(
            key=key.name,
            outcome=outcome,
            before=key.provider,
            provider=key.provider if stays else current,
            reason=_STAYS if stays else None,
        )

    async def _rewrap_data_key(self, key: WrappedKey, actor: str) -> Outcome:
        current = self._providers.current
        before = self._providers.by_name(key.provider)
        clear = await before.unwrap(key.wrapped, context=key.name)
        _check(key.name, kcv.aes(clear).hex().upper(), key.kcv)
        if before is current and await current.is_current(key.wrapped, context=key.name):
            return "current"
        wrapped = await proven.wrap(current, clear, context=key.name)
        database = self._database if key.schema == "cde" else self._glam
        return await self._write(
            database, key.name, actor, lambda c: store.rewrap(c, key, wrapped, current.name)
        )

    async def _rewrap_bdk(self, key: HeldBdk, actor: str) -> Outcome:
        current = self._providers.current
        before = self._providers.by_name(key.provider)
        if key.kept.wrapped is None:
            return await self._check_object(key, before)
        clear = await before.unwrap(key.kept.wrapped, context=key.name)
        _check(key.name, dukpt.key_check_value(clear, key.scheme), key.kcv)
        if before is current and await current.is_current(key.kept.wrapped, context=key.name):
            return "current"
        kept = await proven.keep_bdk(current, clear, scheme=key.scheme, context=key.name)
        return await self._write(
            self._database,
            key.name,
            actor,
            lambda c: store.rewrap_bdk(c, key, kept, current.name),
        )

    async def _check_object(self, key: HeldBdk, provider: KeyProvider) -> Outcome:
        assert key.kept.hsm_label is not None, "wrapped or an object, one of the two"
        found = await provider.bdk_kcv(key.kept.hsm_label, scheme=key.scheme)
        _check(key.name, found, key.kcv)
        return "current" if provider is self._providers.current else "stays"

    async def _write(
        self,
        database: Database,
        name: str,
        actor: str,
        change: Callable[[Connection], Awaitable[bool]],
    ) -> Outcome:
        # Recorded before it is committed: should the process die in between, the audit names a
        # rewrap that is not there, which the next one makes good; never the other way round.
        async with database.transaction() as connection:
            if not await change(connection):
                return "changed"
            await self._write_down(name, actor, "ok")
        return "rewrapped"

    async def _write_down(self, name: str, actor: str, outcome: str) -> None:
        await self._operations.write_down(ACTION, subject=name, actor=actor, outcome=outcome)


async def _trouble(provider: KeyProvider) -> str | None:
    try:
        await provider.health()
    except GlamError as error:
        return error.message
    return None


def _check(name: str, found: str, expected: str) -> None:
    if not hmac.compare_digest(found, expected):
        raise CryptoError(f"{name} does not fit its check value {expected}")
