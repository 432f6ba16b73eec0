"""What a key provider does, whoever it is, and how long it may take.

A provider wraps a key so that only it, and only under the same name, opens it again; keeps a base
derivation key (BDK), wrapped for us or as an object of its own; and derives initial keys from it.
Several providers may be there at once: one wraps what is new, the others still open what they
wrapped before. No database here.
"""

import asyncio
from collections.abc import Awaitable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Literal, Protocol, TypeVar, get_args

from glamd.errors import CryptoError, UnavailableError

T = TypeVar("T")

ProviderName = Literal["local", "aws-kms", "pkcs11"]
PROVIDER_NAMES: Final = get_args(ProviderName)

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

    async def keep_bdk(self, bdk: bytes, *, scheme: str, context: str) -> KeptBdk:
        """Take a BDK (TDES 16 bytes; AES 16, 24 or 32) into keeping."""

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
        """Return when keys can be wrapped and unwrapped; UnavailableError otherwise."""

    async def close(self) -> None:
        """Let go of connections, sessions and threads."""


class Providers:
    """The provider that wraps what is new, and those that still open what they wrapped."""

    def __init__(self, current: KeyProvider, *, former: Sequence[KeyProvider] = ()) -> None:
        self.current = current
        self._by_name: Mapping[str, KeyProvider] = {
            provider.name: provider for provider in (*former, current)
        }

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
        await within(self.current, self.current.health())

    async def close(self) -> None:
        """Close them all."""
        for provider in self._by_name.values():
            await provider.close()


async def within(provider: KeyProvider, work: Awaitable[T]) -> T:
    """What the provider answers within TIMEOUT_S; UnavailableError beyond it."""
    try:
        async with asyncio.timeout(TIMEOUT_S):
            return await work
    except TimeoutError:
        msg = f"The key provider {provider.name} does not answer in time."
        raise UnavailableError(msg) from None
