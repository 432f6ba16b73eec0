"""What a key provider does, whoever it is, and how long it may take.

A provider wraps a key so that only it, and only under the same name, opens it again; keeps a base
derivation key (BDK), wrapped for us or as an object of its own; and derives initial keys from it.
Several providers may be there at once: one wraps what is new, the others still open what they
wrapped before. No database here.
"""

import asyncio
from collections.abc import Awaitable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Literal, Protocol, TypeVar

import structlog
from prometheus_client import Counter, Histogram
from typing_extensions import override

from glamd.errors import CryptoError, GlamError, UnavailableError

T = TypeVar("T")

log = structlog.get_logger()

ProviderName = Literal["local", "aws-kms", "pkcs11"]

TIMEOUT_S: Final = 5.0
"""How long one wrap, unwrap or derivation may take."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KeptBdk:
    """A BDK as its provider keeps it: wrapped bytes for us to store, or an object's label there."""

    wrapped: bytes | None = field(default=None, repr=False)
    hsm_label: str | None = None

    def __post_init__(self) -> None:
        assert (self.wrapped is None) != (self.hsm_label is None), "one of the two, not both"


class KeyProvider(Protocol):
    """One provider. Whatever is away or too slow is an UnavailableError, which may pass.

    `context` is the key's name (`payment-tokens:v2`, `bdk:lane-1`) and bound to what is wrapped:
    under another one it does not open.
    """

    @property
    def name(self) -> ProviderName:
        """What stands in the rows of the keys that it wrapped."""

    async def wrap(self, key: bytes, *, context: str) -> bytes:
        """Wrap a key of 16 to 32 bytes."""

    async def unwrap(self, wrapped: bytes, *, context: str) -> bytes:
        """The key; CryptoError where the bytes, the context or the KEK are not what they were."""

    async def is_current(self, wrapped: bytes, *, context: str) -> bool:
        """Whether the KEK that `wrap` uses now wrapped this, and not a former one of the provider.

        For bytes that `unwrap` opens. UnavailableError.
        """

    async def keep_bdk(self, bdk: bytes, *, scheme: str, context: str) -> KeptBdk:
        """Take a BDK (TDES 16 bytes; AES 16, 24 or 32) into keeping; twice is as good as once."""

    async def bdk_kcv(self, hsm_label: str, *, scheme: str) -> str:
        """The check value (6 hexadecimals) of a BDK that is the provider's own object.

        InputError (`hsm_label`) where there is no such object, it is of another kind, or it could
        be taken out of the device; also where this provider holds no objects.
        """

    async def initial_key(self, bdk: KeptBdk, *, scheme: str, ksn: bytes, context: str) -> bytes:
        """The initial key of the device with this KSN (TDES 10 bytes, AES 12).

        InputError for a KSN of the wrong length; CryptoError as `unwrap`.
        """

    async def health(self) -> None:
        """Return when keys can be wrapped and unwrapped.

        UnavailableError where the provider is away, which may pass; CryptoError where it answers
        and refuses, with what an operator has to do.
        """

    async def close(self) -> None:
        """Let go of connections, sessions and threads."""


class Providers:
    """The provider that wraps what is new, and those that still open what they wrapped.

    Each call to one of them is bounded by TIMEOUT_S and measured.
    """

    def __init__(self, current: KeyProvider, *, former: Sequence[KeyProvider] = ()) -> None:
        self.current: KeyProvider = Measured(current)
        self._by_name: Mapping[str, KeyProvider] = {
            **{provider.name: Measured(provider) for provider in former},
            current.name: self.current,
        }

    @property
    def all(self) -> Sequence[KeyProvider]:
        """Every provider, the current one last."""
        return tuple(self._by_name.values())

    def by_name(self, name: str) -> KeyProvider:
        """The provider with this name; CryptoError where it is not configured."""
        provider = self._by_name.get(name)
        if provider is None:
            raise CryptoError(
                f"the key was wrapped by the key provider {name}, which is not configured; "
                "name it in keys.former_providers"
            )
        return provider

    async def health(self) -> None:
        """Return when the current provider works; UnavailableError otherwise."""
        try:
            await self.current.health()
        except CryptoError as refused:
            raise UnavailableError(refused.message) from None

    async def close(self) -> None:
        """Close them all; one that does not let go in time is left behind, and logged."""
        for provider in self._by_name.values():
            try:
                await within(provider, provider.close())
            except UnavailableError:
                log.warning("key_provider_not_closed", provider=provider.name)


async def within(provider: KeyProvider, work: Awaitable[T]) -> T:
    """What the provider answers within TIMEOUT_S; UnavailableError beyond it."""
    try:
        async with asyncio.timeout(TIMEOUT_S):
            return await work
    except TimeoutError:
        msg = f"The key provider {provider.name} does not answer in time."
        raise UnavailableError(msg) from None


_SECONDS = Histogram(
    "glamd_keys_provider_calls_seconds",
    "How long key providers took to answer.",
    ["provider", "operation"],
    buckets=(0.0005, 0.002, 0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0),
)
_ERRORS = Counter(
    "glamd_keys_provider_errors_total",
    "Calls to key providers that failed, by kind of error.",
    ["provider", "kind"],
)


class Measured(KeyProvider):
    """A provider with every call bounded and measured; what it does is the provider's own."""

    def __init__(self, provider: KeyProvider) -> None:
        self._provider = provider

    @property
    @override
    def name(self) -> ProviderName:
        """The provider's."""
        return self._provider.name

    @override
    async def wrap(self, key: bytes, *, context: str) -> bytes:
        return await self._call("wrap", self._provider.wrap(key, context=context))

    @override
    async def unwrap(self, wrapped: bytes, *, context: str) -> bytes:
        return await self._call("unwrap", self._provider.unwrap(wrapped, context=context))

    @override
    async def is_current(self, wrapped: bytes, *, context: str) -> bool:
        return await self._call("is_current", self._provider.is_current(wrapped, context=context))

    @override
    async def keep_bdk(self, bdk: bytes, *, scheme: str, context: str) -> KeptBdk:
        work = self._provider.keep_bdk(bdk, scheme=scheme, context=context)
        return await self._call("keep_bdk", work)

    @override
    async def bdk_kcv(self, hsm_label: str, *, scheme: str) -> str:
        return await self._call("bdk_kcv", self._provider.bdk_kcv(hsm_label, scheme=scheme))

    @override
    async def initial_key(self, bdk: KeptBdk, *, scheme: str, ksn: bytes, context: str) -> bytes:
        work = self._provider.initial_key(bdk, scheme=scheme, ksn=ksn, context=context)
        return await self._call("initial_key", work)

    @override
    async def health(self) -> None:
        await self._call("health", self._provider.health())

    @override
    async def close(self) -> None:
        await self._provider.close()

    async def _call(self, operation: str, work: Awaitable[T]) -> T:
        with _SECONDS.labels(self.name, operation).time():
            try:
                return await within(self._provider, work)
            except GlamError as error:
                _ERRORS.labels(self.name, error.code).inc()
                raise

    def __repr__(self) -> str:
        return repr(self._provider)
