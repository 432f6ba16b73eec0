"""What can be done with keys by name: import a base derivation key, list, derive an initial key.

Every operation on a key leaves its audit row before it is answered; who writes the row is handed
in, since the audit belongs to `glamd.payments`, which stands above. Asking for components and the
DUKPT of a transaction do not live here.
"""

import hmac
import re
from typing import Final, NamedTuple

import structlog

from glamd.clock import Clock
from glamd.crypto.dukpt import TDES_DUKPT, Profile
from glamd.db import Database
from glamd.errors import ConflictError, FieldError, GlamError, NotFoundError
from glamd.keys import store as key_store
from glamd.keys.key_sets import ceremony, store
from glamd.keys.key_sets.store import KeySet, StoredKeySet
from glamd.keys.operations import Operations, Record
from glamd.keys.providers.interface import KeptBdk, Providers, within
from glamd.keys.store import KeyVersion

COUNTER_WINDOW: Final = 1024
"""How many counters behind the highest one may still come, when nothing else is said."""

COUNTER_WINDOW_MIN: Final = 8
COUNTER_WINDOW_MAX: Final = 65_536

GENERIC_READER: Final = "generic"
"""A reader that puts nothing around its ciphertext."""

log = structlog.get_logger()

_KEY_SET_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}", re.ASCII)


class DeviceKey(NamedTuple):
    """A device's initial key (TDES 16 bytes; AES as long as its BDK), and how the device encrypts.

    It shows itself without the key.
    """

    profile: Profile
    reader: str
    key: bytes

    def __repr__(self) -> str:
        return f"<DeviceKey of {self.profile.scheme}, masked>"


class Keys:
    """Base derivation keys, by key-set id, and what is known of the data keys."""

    def __init__(
        self,
        *,
        database: Database,
        glam: Database,
        providers: Providers,
        identity_key: bytes,
        record: Record,
        clock: Clock,
    ) -> None:
        """`identity_key` is a key that is never rotated: that of the fingerprints.

        `glam` is where the data keys of all that is no card data are, for lists.
        """
        self._glam = glam
        self._identity_key = identity_key
        self._database = database
        self._providers = providers
        self._operations = Operations(record)
        self._clock = clock

    async def import_bdk(
        self,
        *,
        key_set: str,
        profile: Profile,
        bdk: bytes,
        actor: str,
        reader: str = GENERIC_READER,
        counter_window: int = COUNTER_WINDOW,
    ) -> KeySet:
        """Wrap a BDK (TDES 16 bytes; AES 16, 24 or 32) and keep it under a name of its own.

        InputError naming the field (`key_set`, `bdk`, `counter_window`); ConflictError
        KEY_SET_EXISTS, also when it is the same key; UnavailableError. Each attempt is recorded.
        """
        try:
            _check(key_set, profile, bdk, counter_window)
            provider = self._providers.current
            kept = await within(
                provider,
                provider.keep_bdk(bdk, scheme=profile.scheme, context=_context(key_set)),
            )
            made = KeySet(
                key_set=key_set,
                profile=profile,
                reader=reader,
                counter_window=counter_window,
                kcv=ceremony.key_check_value(bdk, profile.scheme),
                provider=provider.name,
                hsm_label=kept.hsm_label,
                status="active",
                created_at=self._clock.now(),
                retired_at=None,
            )
            await self._add(made, kept, actor)
        except GlamError as refused:
            await self.refused_import(key_set=key_set, actor=actor, code=refused.code)
            raise
        log.info("bdk_imported", key_set=key_set, kcv=made.kcv, actor=actor)
        return made

    async def refused_import(self, *, key_set: str, actor: str, code: str) -> None:
        """Record an import that did not get as far as a key, such as a ceremony gone wrong."""
        await self._write_down("bdk.import", key_set, actor, code)

    async def _add(self, made: KeySet, bdk: KeptBdk, actor: str) -> None:
        # The row is recorded before the key set is committed: should the process die in between,
        # the audit names a key that is not there, and never the other way round.
        async with self._database.transaction() as connection:
            if not await store.add_key_set(connection, made, bdk):
                raise ConflictError(
                    "There is a key set of this name already.",
                    code="KEY_SET_EXISTS",
                    fields=(FieldError("key_set", "it is taken"),),
                )
            await self._write_down("bdk.import", made.key_set, actor, "ok")

    async def _write_down(self, action: str, subject: str, actor: str, outcome: str) -> None:
        await self._operations.write_down(action, subject=subject, actor=actor, outcome=outcome)

    async def list_keys(self) -> tuple[KeyVersion, ...]:
        """Every version of every keyring, destroyed ones too; keys stay wrapped."""
        card_data = await key_store.keys(self._database, "cde")
        return (*card_data, *await key_store.keys(self._glam, "glam"))

    async def list_key_sets(self) -> tuple[KeySet, ...]:
        """Every key set, by name."""
        return await store.key_sets(self._database)

    async def key_set(self, name: str) -> KeySet:
        """One key set; NotFoundError KEY_SET_UNKNOWN."""
        return (await self._stored(name)).key_set

    async def initial_key(self, key_set: str, ksn: bytes) -> DeviceKey:
        """The initial key of the device with this KSN (TDES 10 bytes, AES 12), and how it encrypts.

        NotFoundError KEY_SET_UNKNOWN; InputError for a KSN of the wrong length; CryptoError when
        the BDK does not unwrap; UnavailableError when the database or the provider is away.
        """
        stored = await self._stored(key_set)
        found = stored.key_set
        provider = self._providers.by_name(found.provider)
        key = await within(
            provider,
            provider.initial_key(
                stored.bdk, scheme=found.profile.scheme, ksn=ksn, context=_context(key_set)
            ),
        )
        return DeviceKey(found.profile, found.reader, key)

    def identity_of(self, initial_key: bytes) -> bytes:
        """A keyed hash (32 bytes) by which an initial key is known again and nothing else."""
        return hmac.digest(self._identity_key, b"initial key|" + initial_key, "sha256")

    async def _stored(self, name: str) -> StoredKeySet:
        stored = (
            await store.key_set(self._database, name) if _KEY_SET_NAME.fullmatch(name) else None
        )
        if stored is None:
            raise NotFoundError("There is no such key set.", code="KEY_SET_UNKNOWN")
        return stored


def _check(key_set: str, profile: Profile, bdk: bytes, counter_window: int) -> None:
    if not _KEY_SET_NAME.fullmatch(key_set):
        raise ceremony.wrong("key_set", "it is 1 to 64 letters, digits, '_', '.' or '-'")
    in_range = COUNTER_WINDOW_MIN <= counter_window <= COUNTER_WINDOW_MAX
    if not in_range or counter_window % 8:
        message = f"it is {COUNTER_WINDOW_MIN} to {COUNTER_WINDOW_MAX} and a multiple of 8"
        raise ceremony.wrong("counter_window", message)
    ceremony.check_length(bdk, profile.scheme, field="bdk")
    if not any(bdk):
        raise ceremony.wrong("bdk", "it is zero")
    if profile.scheme == TDES_DUKPT:
        _check_tdes(bdk)


def _check_tdes(bdk: bytes) -> None:
    normal = ceremony.odd_parity(bdk)
    if normal[:8] == normal[8:]:
        raise ceremony.wrong("bdk", "its halves are equal, which makes it a single DES key")


def _context(key_set: str) -> str:
    return f"bdk:{key_set}"
