"""What can be done with base derivation keys by name: import, list, retire, derive an initial key.

A key comes as components, as a key block under components of its protection key, as an object that
an HSM holds already, or in the clear. Every operation leaves its audit rows before it is answered;
who writes them is handed in, since the audit belongs to `glamd.payments`, which stands above.
Asking for components and the DUKPT of a transaction do not live here.
"""

import hmac
import re
from dataclasses import dataclass, field
from typing import Final, NamedTuple

import structlog

from glamd.clock import Clock
from glamd.crypto import dukpt, keyblock
from glamd.crypto.blocks import odd_parity
from glamd.crypto.dukpt import TDES_DUKPT, Profile
from glamd.db import Database
from glamd.errors import ConflictError, FieldError, NotFoundError
from glamd.keys import store as key_store
from glamd.keys.key_sets import ceremony, store
from glamd.keys.key_sets.ceremony import Ceremony, Component
from glamd.keys.key_sets.store import KeySet, ListedKeySet, StoredKeySet
from glamd.keys.operations import Operations, Record
from glamd.keys.providers import proven
from glamd.keys.providers.interface import KeptBdk, Providers
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


@dataclass(frozen=True, slots=True)
class ProtectedKey:
    """A BDK in a TR-31 or X9.143 key block, and the components of its protection key."""

    block: str = field(repr=False)
    kbpk: tuple[Component, ...]


@dataclass(frozen=True, slots=True)
class HsmKey:
    """A BDK that the key provider's device holds already, by its label there."""

    label: str


BdkSource = bytes | tuple[Component, ...] | ProtectedKey | HsmKey
"""How a BDK comes: in the clear, as components, in a key block, or not at all, for it is there."""


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
        readers: frozenset[str] = frozenset({GENERIC_READER}),
    ) -> None:
        """`identity_key` is a key that is never rotated: that of the fingerprints.

        `glam` is where the data keys of all that is no card data are, for lists; `readers` are the
        names of the readers whose ciphertexts can be taken apart.
        """
        self._glam = glam
        self._identity_key = identity_key
        self._database = database
        self._providers = providers
        self._operations = Operations(record)
        self._clock = clock
        self._readers = readers

    async def import_bdk(
        self,
        *,
        key_set: str,
        profile: Profile,
        bdk: BdkSource,
        actor: str,
        reader: str = GENERIC_READER,
        counter_window: int = COUNTER_WINDOW,
    ) -> KeySet:
        """Keep a BDK (TDES 16 bytes; AES 16, 24 or 32) under a name of its own.

        InputError naming the field (`key_set`, `reader`, `counter_window`, `bdk`, `components…`,
        `key_block…`, `kbpk…`, `hsm_label`); ConflictError KEY_SET_EXISTS, also when it is the same
        key; UnavailableError. Each attempt is recorded, and each component of a ceremony.
        """
        async with self._operations.recording_refusal("bdk.import", subject=key_set, actor=actor):
            self._check_settings(key_set, reader, counter_window)
            provider = self._providers.current
            if isinstance(bdk, HsmKey):
                kept = KeptBdk(hsm_label=bdk.label)
                kcv = await provider.bdk_kcv(bdk.label, scheme=profile.scheme)
            else:
                clear = await self._entered(bdk, key_set, profile.scheme, actor)
                kcv = dukpt.key_check_value(clear, profile.scheme)
                kept = await proven.keep_bdk(
                    provider, clear, scheme=profile.scheme, context=_context(key_set)
                )
            made = KeySet(
                key_set=key_set,
                profile=profile,
                reader=reader,
                counter_window=counter_window,
                kcv=kcv,
                provider=provider.name,
                hsm_label=kept.hsm_label,
                status="active",
                created_at=self._clock.now(),
                retired_at=None,
            )
            await self._add(made, kept, actor)
        log.info("bdk_imported", key_set=key_set, kcv=made.kcv, actor=actor)
        return made

    async def refused_import(self, *, key_set: str, actor: str, code: str) -> None:
        """Record an import that did not get as far as a key, such as one that is not allowed."""
        await self.write_down("bdk.import", key_set, actor, code)

    async def retire_bdk(self, key_set: str, *, actor: str) -> KeySet:
        """Take no more payments and no more devices under this key set; for good, on every node.

        NotFoundError KEY_SET_UNKNOWN. One that is retired stays as it is. Recorded.
        """
        async with self._operations.recording_refusal("bdk.retire", subject=key_set, actor=actor):
            await self._stored(key_set)
            async with self._database.transaction() as connection:
                await store.retire_key_set(connection, key_set)
                await self.write_down("bdk.retire", key_set, actor, "ok")
            retired = await self.key_set(key_set)
        log.info("bdk_retired", key_set=key_set, kcv=retired.kcv, actor=actor)
        return retired

    async def _entered(
        self,
        bdk: bytes | tuple[Component, ...] | ProtectedKey,
        key_set: str,
        scheme: str,
        actor: str,
    ) -> bytes:
        """The key in the clear, checked: of the scheme's length, and not a weak one."""
        if isinstance(bdk, ProtectedKey):
            keyblock.check_header(bdk.block, scheme=scheme)
            protection = keyblock.protection_scheme(bdk.block)
            lengths = keyblock.kbpk_lengths(bdk.block)
            kbpk = await self._together(
                bdk.kbpk, Ceremony(protection, lengths=lengths, field="kbpk"), key_set, actor
            )
            _check_strength(kbpk, protection, field="kbpk")
            key, named = keyblock.unwrap_bdk(bdk.block, kbpk=kbpk, scheme=scheme), "key_block"
        elif isinstance(bdk, tuple):
            opened = ceremony.bdk_ceremony(scheme)
            key, named = await self._together(bdk, opened, key_set, actor), "components"
        else:
            key, named = bdk, "bdk"
        ceremony.check_length(key, ceremony.bdk_lengths(scheme), field=named)
        _check_strength(key, scheme, field=named)
        return key

    async def _together(
        self, components: tuple[Component, ...], opened: Ceremony, key_set: str, actor: str
    ) -> bytes:
        """The key of some components; who typed which is recorded, right or wrong."""
        for number, component in enumerate(components, 1):
            action = f"{'bdk' if opened.field == 'components' else opened.field}.component"
            subject = f"bdk:{key_set}#{number} KCV {component.kcv.strip().upper()}"
            holder = f"{actor} for {component.holder}"
            async with self._operations.recording_refusal(action, subject=subject, actor=holder):
                opened.take(component)
            await self.write_down(action, subject, holder, "ok")
        return opened.key()

    def _check_settings(self, key_set: str, reader: str, counter_window: int) -> None:
        if not _KEY_SET_NAME.fullmatch(key_set):
            raise ceremony.wrong("key_set", "it is 1 to 64 letters, digits, '_', '.' or '-'")
        if reader not in self._readers:
            raise ceremony.wrong("reader", f"it is one of {', '.join(sorted(self._readers))}")
        in_range = COUNTER_WINDOW_MIN <= counter_window <= COUNTER_WINDOW_MAX
        if not in_range or counter_window % 8:
            message = f"it is {COUNTER_WINDOW_MIN} to {COUNTER_WINDOW_MAX} and a multiple of 8"
            raise ceremony.wrong("counter_window", message)

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
            await self.write_down("bdk.import", made.key_set, actor, "ok")

    async def write_down(self, action: str, subject: str, actor: str, outcome: str) -> None:
        """Record an operation on a key of a device; UnavailableError where that cannot be."""
        await self._operations.write_down(action, subject=subject, actor=actor, outcome=outcome)

    async def list_keys(self) -> tuple[KeyVersion, ...]:
        """Every version of every keyring, destroyed ones too; keys stay wrapped."""
        card_data = await key_store.keys(self._database, "cde")
        return (*card_data, *await key_store.keys(self._glam, "glam"))

    async def list_key_sets(self) -> tuple[ListedKeySet, ...]:
        """Every key set, by name, with how many devices are enrolled under it."""
        return await store.key_sets(self._database)

    async def key_set(self, name: str) -> KeySet:
        """One key set; NotFoundError KEY_SET_UNKNOWN."""
        return (await self._stored(name)).key_set

    async def initial_key(self, key_set: str, ksn: bytes) -> DeviceKey:
        """The initial key of the device with this KSN (TDES 10 bytes, AES 12), and how it encrypts.

        NotFoundError KEY_SET_UNKNOWN, also where it is retired; InputError for a KSN of the wrong
        length; CryptoError when the BDK does not unwrap; UnavailableError when the database or the
        provider is away.
        """
        stored = await self._stored(key_set)
        found = stored.key_set
        if found.status != "active":
            raise _unknown()
        provider = self._providers.by_name(found.provider)
        key = await provider.initial_key(
            stored.bdk, scheme=found.profile.scheme, ksn=ksn, context=_context(key_set)
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
            raise _unknown()
        return stored


def _check_strength(key: bytes, scheme: str, *, field: str) -> None:
    if not any(key):
        raise ceremony.wrong(field, "it is zero")
    if scheme == TDES_DUKPT:
        normal = odd_parity(key)
        if normal[:8] == normal[8:16]:
            raise ceremony.wrong(field, "its halves are equal, which makes it a single DES key")


def _unknown() -> NotFoundError:
    return NotFoundError("There is no such key set.", code="KEY_SET_UNKNOWN")


def _context(key_set: str) -> str:
    return f"bdk:{key_set}"
