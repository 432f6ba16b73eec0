"""Keyrings: the data keys by name and version, unwrapped once and then in memory.

A version that another node made is fetched when a row names it. The tables' states are respected:
one version is active, destroyed ones are gone, all others open what they sealed. When a version is
rotated, retired and destroyed is for `lifecycle`; nothing that uses a key lives here either.
"""

import asyncio
import hmac
import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Final, Generic, TypeAlias, TypeVar

import structlog
from prometheus_client import Counter as Counted
from prometheus_client import Gauge
from typing_extensions import override

from glamd.clock import Clock
from glamd.crypto import kcv
from glamd.crypto.aead import Sealer
from glamd.db import Database
from glamd.errors import ConfigError, CryptoError, GlamError
from glamd.keys import store
from glamd.keys.providers import proven
from glamd.keys.providers.interface import Providers
from glamd.keys.store import STATUSES, KeyVersion, NewKey, Schema
from glamd.keys.version_names import is_name

PAYMENT_TOKENS: Final = "payment-tokens"
PLATFORM_TOKENS: Final = "platform-tokens"
FINGERPRINTS: Final = "fingerprints"
AUDIT: Final = "audit"

KEY_BYTES: Final = 32
"""Every data key: AES-256 for sealing, and as long for HMAC-SHA-256."""

log = structlog.get_logger()

_VERSIONS = Gauge(
    "glamd_keys_versions_count", "Key versions, by what they are for.", ["keyring", "status"]
)
_SEALED = Counted(
    "glamd_keys_sealed_total", "Messages sealed, of 2^32 for each version.", ["keyring", "version"]
)


class _CountingSealer(Sealer):
    """Counts what it seals, for a random nonce is good for so many messages only."""

    __slots__ = ("_sealed",)

    def __init__(self, key: bytes, sealed: Counted) -> None:
        super().__init__(key)
        self._sealed = sealed

    @override
    def seal(self, plaintext: bytes | bytearray, *, associated_data: bytes) -> bytes:
        self._sealed.inc()
        return super().seal(plaintext, associated_data=associated_data)


@dataclass(frozen=True, slots=True)
class DataKey:
    """One version that seals; `version` goes into the row beside what it sealed."""

    version: str
    sealer: Sealer = field(repr=False)
    kcv: str


@dataclass(frozen=True, slots=True)
class MacKey:
    """One version that is an HMAC-SHA-256 key of 32 bytes."""

    version: str
    key: bytes = field(repr=False)
    kcv: str


K = TypeVar("K", bound=DataKey | MacKey)


class Keyring(Generic[K]):
    """The versions of one key that are not destroyed, ready to use."""

    def __init__(
        self,
        name: str,
        *,
        database: Database,
        providers: Providers,
        make: Callable[[str, bytes, str], K],
        schema: Schema = "cde",
    ) -> None:
        self.name = name
        self.schema: Final[Schema] = schema
        self.database: Final = database
        self._providers = providers
        self._make = make
        self._reloading = asyncio.Lock()
        self._by_version: dict[str, K] = {}
        self._destroyed: frozenset[str] = frozenset()
        self._active: K | None = None
        self.first_made: str | None = None
        """The first version, where it was made here: the audit that has to know is opened later."""

    @property
    def active(self) -> K:
        """The version that new rows are made with; CryptoError before the first `reload`."""
        if self._active is None:
            raise CryptoError(f"the keyring {self.name} is not loaded")
        return self._active

    @property
    def kcvs(self) -> dict[str, str]:
        """The key check value of every version in memory."""
        return {version: key.kcv for version, key in self._by_version.items()}

    async def version(self, version: str) -> K:
        """The key of this version; the database is asked once when it is not in memory.

        CryptoError when it is destroyed, does not unwrap or does not exist; UnavailableError when
        the database or the provider is away.
        """
        key = self._by_version.get(version)
        if key is not None:
            return key
        async with self._reloading:
            # Whoever waited for the lock finds what the one before has fetched.
            key = self._by_version.get(version)
            if key is None:
                await self._read()
                key = self._by_version.get(version)
        if key is not None:
            return key
        if version in self._destroyed:
            raise CryptoError(f"version {version} of the key {self.name} is destroyed")
        raise CryptoError(f"there is no version {version} of the key {self.name}")

    async def reload(self) -> None:
        """Read all versions, unwrap those that are new here, forget those that are destroyed.

        CryptoError, UnavailableError; on any error what is in memory stays as it was.
        """
        # One after the other: a slow look must not put back what a later one has replaced.
        async with self._reloading:
            await self._read()

    async def _read(self) -> None:
        rows = await store.keys(self.database, self.schema, self.name)
        loaded: dict[str, K] = {}
        active = None
        for row in rows:
            if row.wrapped_key is None:
                continue
            known = self._by_version.get(row.version)
            loaded[row.version] = key = known or await self._unwrap(row, row.wrapped_key)
            if row.status == "active":
                active = key
        if active is None:
            raise CryptoError(f"the keyring {self.name} has no active version")
        self._by_version = loaded
        self._destroyed = frozenset(row.version for row in rows if row.wrapped_key is None)
        self._active = active
        count = Counter(row.status for row in rows)
        for status in STATUSES:
            _VERSIONS.labels(self.name, status).set(count[status])

    async def _unwrap(self, row: KeyVersion, wrapped: bytes) -> K:
        provider = self._providers.by_name(row.provider)
        context = _context(row.keyring, row.version)
        clear = await provider.unwrap(wrapped, context=context)
        if len(clear) != KEY_BYTES or not hmac.compare_digest(_kcv(clear), row.kcv):
            raise CryptoError(f"{row.keyring} {row.version} does not fit its check value {row.kcv}")
        return self._make(row.version, clear, row.kcv)

    async def load(self, clock: Clock, first_version: str) -> None:
        """Make `first_version` if the keyring has none, and unwrap every version.

        ConfigError when a key does not unwrap (the wrong KEK), no version is active or
        `first_version` is no name; UnavailableError when the database or the provider is away.
        """
        if not is_name(first_version):
            raise ConfigError("The first key version is 1 to 32 letters, digits, '_', '.' or '-'.")
        if not await store.keys(self.database, self.schema, self.name):
            await self._make_first(first_version, clock)
        try:
            await self.reload()
        except CryptoError as error:
            raise ConfigError(f"The keys cannot be used: {error.message}.") from None
        log.info("keyring_loaded", keyring=self.name, kcvs=self.kcvs)

    async def make(self, version: str) -> NewKey:
        """A random key under this name, wrapped by the current provider, in no table yet.

        CryptoError where the provider does not give it back; UnavailableError when it is away.
        """
        key = os.urandom(KEY_BYTES)
        provider = self._providers.current
        context = _context(self.name, version)
        wrapped = await proven.wrap(provider, key, context=context)
        return NewKey(
            keyring=self.name,
            version=version,
            wrapped_key=wrapped,
            provider=provider.name,
            kcv=_kcv(key),
        )

    async def _make_first(self, version: str, clock: Clock) -> None:
        """Two nodes may try at once; one of them wins."""
        key = await self.make(version)
        async with self.database.connection() as connection:
            if await store.add_first_key(connection, self.schema, key, at=clock.now()):
                self.first_made = version

    def __repr__(self) -> str:
        return f"<Keyring {self.name}, versions {', '.join(self._by_version)}, keys masked>"


AnyKeyring: TypeAlias = Keyring[DataKey] | Keyring[MacKey]


class KeyringWatch:
    """Reads every keyring at a steady beat: what another node rotates or destroys is known here."""

    def __init__(self, keyrings: Sequence[AnyKeyring], *, interval_s: float) -> None:
        self._keyrings = tuple(keyrings)
        self._interval_s = interval_s

    async def run(self) -> None:
        """Look at every beat until cancelled; what is in memory goes on working meanwhile."""
        while True:
            await asyncio.sleep(self._interval_s)
            await self.look()

    async def look(self) -> None:
        """Read every keyring once; one that cannot be read is logged and stays as it was."""
        for keyring in self._keyrings:
            try:
                await keyring.reload()
            except GlamError as error:
                log.warning(
                    "keyring_not_reloaded", keyring=keyring.name, code=error.code, why=error.message
                )


class Keyrings:
    """The keyrings of card data."""

    def __init__(self, *, database: Database, providers: Providers) -> None:
        self.payment_tokens: Keyring[DataKey] = Keyring(
            PAYMENT_TOKENS,
            database=database,
            providers=providers,
            make=partial(_data_key, PAYMENT_TOKENS),
        )
        self.fingerprints: Keyring[MacKey] = Keyring(
            FINGERPRINTS, database=database, providers=providers, make=MacKey
        )
        self.audit: Keyring[MacKey] = Keyring(
            AUDIT, database=database, providers=providers, make=MacKey
        )

    @classmethod
    async def load(
        cls, database: Database, providers: Providers, clock: Clock, first_version: str
    ) -> "Keyrings":
        """Make what keyring is missing, with `first_version`, and unwrap every version.

        Errors as `Keyring.load`.
        """
        keyrings = cls(database=database, providers=providers)
        for keyring in keyrings.all():
            await keyring.load(clock, first_version)
        return keyrings

    def all(self) -> Sequence[AnyKeyring]:
        """Every keyring."""
        return (self.payment_tokens, self.fingerprints, self.audit)

    def __repr__(self) -> str:
        return f"<Keyrings {', '.join(repr(keyring) for keyring in self.all())}>"


def platform_tokens(*, database: Database, providers: Providers) -> Keyring[DataKey]:
    """The keyring of platform tokens, in schema `glam`; not loaded yet."""
    return Keyring(
        PLATFORM_TOKENS,
        database=database,
        providers=providers,
        make=partial(_data_key, PLATFORM_TOKENS),
        schema="glam",
    )


def _data_key(keyring: str, version: str, key: bytes, check: str) -> DataKey:
    return DataKey(version, _CountingSealer(key, _SEALED.labels(keyring, version)), check)


def _context(keyring: str, version: str) -> str:
    return f"{keyring}:{version}"


def _kcv(key: bytes) -> str:
    return kcv.aes(key).hex().upper()
