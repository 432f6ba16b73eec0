"""The key provider `pkcs11`: KEK and BDKs are objects of an HSM, and initial keys derived by it.

A BDK never leaves the HSM. Data keys and initial keys do, for they are used here. This file wants
the extra `hsm` and is imported by `opening` alone, once the configuration names this provider. The
objects themselves are handled in `hsm`, on the thread of `one_thread`. No database here.
"""

import os
from collections.abc import Callable
from functools import partial
from typing import Final, TypeVar

import pkcs11
from pkcs11 import Attribute, GCMParams, KeyType, Mechanism, SecretKey, Session
from typing_extensions import override

from glamd.crypto import dukpt, dukpt_aes, kcv
from glamd.crypto.blocks import AES_BLOCK_BYTES, TDEA_BLOCK_BYTES, odd_parity
from glamd.crypto.dukpt import AES_DUKPT, TDES_DUKPT, key_check_value
from glamd.errors import ConfigError, CryptoError, FieldError, GlamError, InputError
from glamd.keys.providers import hsm
from glamd.keys.providers.hsm import Hsm, TokenAddress
from glamd.keys.providers.interface import KeptBdk, KeyProvider, ProviderName
from glamd.keys.providers.one_thread import PKCS11

T = TypeVar("T")

FORMAT: Final = b"\x03"
"""First byte of what `wrap` returns: the KEK's label (its length in a byte), IV, AES-256-GCM."""

BDK_LABEL_PREFIX: Final = "glamd-bdk-"
RIGHT_HALF_SUFFIX: Final = "-c0"
"""Behind a TDES BDK's label: that of the object which derives the right half of initial keys."""

_IV_BYTES: Final = 12
_TAG_BITS: Final = 128
_KEK_BYTES: Final = 32
_LABEL_LIMIT_BYTES: Final = 64
_CONTEXT: Final = b"glamd key "
_C0_KEY: Final = int.from_bytes(bytes.fromhex("C0C0C0C000000000") * 2, "big")
"""X9.24-1:2009, A.6: BDK XOR this derives the right half."""

_TDES_TYPES: Final = frozenset({KeyType.DES2, KeyType.DES3})


class Pkcs11Provider(KeyProvider):
    """Wraps under a key that no one can read, and derives where the BDK is."""

    @property
    @override
    def name(self) -> ProviderName:
        """`pkcs11`."""
        return "pkcs11"

    def __init__(self, address: TokenAddress, *, kek_label: str) -> None:
        """ConfigError where the module or the PIN's file is not there; the token is not asked."""
        if not 0 < len(kek_label.encode()) <= _LABEL_LIMIT_BYTES:
            raise _config("kek_label", f"it is 1 to {_LABEL_LIMIT_BYTES} bytes")
        if not address.module.is_file():
            raise _config("module", f"{address.module} is no file")
        address.pin()
        self._address = address
        self._kek_label = kek_label
        self._hsm = Hsm(address)

    async def create_kek(self) -> None:
        """Have the HSM make the KEK by itself, unless it is there; for who has no tool for it."""

        def work(session: Session) -> None:
            if hsm.find(session, self._kek_label) is None:
                hsm.generate_kek(session, self._kek_label)

        await self._run(work)

    @override
    async def wrap(self, key: bytes, *, context: str) -> bytes:
        """AES-256-GCM in the HSM; the KEK's label and the key's name are bound to it."""
        head = _head(self._kek_label)
        iv = os.urandom(_IV_BYTES)

        def work(session: Session) -> bytes:
            kek = self._kek(session, self._kek_label)
            return hsm.encrypt(kek, key, Mechanism.AES_GCM, _gcm(iv, head, context))

        return head + iv + await self._run(work)

    @override
    async def unwrap(self, wrapped: bytes, *, context: str) -> bytes:
        """Decrypted in the HSM, by the KEK whose label stands in the wrapped bytes."""
        label, iv, sealed = _parts(wrapped, context)
        params = _gcm(iv, _head(label), context)
        return await self._run(lambda s: self._decrypt(s, label, sealed, params, context))

    @override
    async def is_current(self, wrapped: bytes, *, context: str) -> bool:
        """Whether the KEK with the configured label wrapped it."""
        return _parts(wrapped, context)[0] == self._kek_label

    @override
    async def keep_bdk(self, bdk: bytes, *, scheme: str, context: str) -> KeptBdk:
        """Make it an object of the HSM (TDES: two), which does not come out again.

        The label holds its check value, so that another key of the same name is another object.
        CryptoError where an object of this label is there and is not this key.
        """
        label = f"{BDK_LABEL_PREFIX}{context.removeprefix('bdk:')}"
        return await self._run(partial(_keep, bdk=bdk, scheme=scheme, name=label))

    @override
    async def bdk_kcv(self, hsm_label: str, *, scheme: str) -> str:
        """Computed in the HSM; refuses an object that could be taken out or is of another kind."""
        return await self._run(partial(_checked_kcv, label=hsm_label, scheme=scheme))

    @override
    async def initial_key(self, bdk: KeptBdk, *, scheme: str, ksn: bytes, context: str) -> bytes:
        """Derived in the HSM; the BDK stays there."""
        label = bdk.hsm_label
        if label is None:
            raise CryptoError(f"the key {context} is wrapped, not an object of provider pkcs11")
        key_id = dukpt.initial_key_id(scheme, ksn)
        missing = CryptoError(f"the HSM has no object {label}, which is the key {context}")
        derive = _derive_tdes if scheme == TDES_DUKPT else _derive_aes
        return await self._run(partial(derive, label=label, key_id=key_id, missing=missing))

    @override
    async def health(self) -> None:
        """Encrypt and decrypt a few random bytes under the KEK."""
        probe = os.urandom(AES_BLOCK_BYTES)
        if await self.unwrap(await self.wrap(probe, context="health"), context="health") != probe:
            raise CryptoError("the HSM does not give back what it wrapped")

    @override
    async def close(self) -> None:
        """End the session; the thread waits for who comes next."""
        await PKCS11.run(self._hsm.close)

    async def _run(self, work: Callable[[Session], T]) -> T:
        return await PKCS11.run(lambda: self._hsm.run(work))

    def _kek(self, session: Session, label: str) -> SecretKey:
        address = self._address
        missing = (
            f"the HSM's token {address.token_label} has no key-encryption key {label}; make it "
            f"with: pkcs11-tool --module {address.module} --token-label {address.token_label} "
            f"--login --keygen --key-type AES:{_KEK_BYTES} --label {label} --private --sensitive"
        )
        kek = hsm.require(session, label, _kek_error(missing))
        if kek[Attribute.KEY_TYPE] != KeyType.AES or kek[Attribute.VALUE_LEN] != _KEK_BYTES:
            raise _kek_error(f"the key-encryption key {label} is no AES key of {_KEK_BYTES} bytes")
        weakness = hsm.weakness(kek)
        if weakness is not None:
            raise _kek_error(f"the key-encryption key {label} {weakness}")
        return kek

    def _decrypt(
        self, session: Session, label: str, sealed: bytes, params: GCMParams, context: str
    ) -> bytes:
        kek = self._kek(session, label)
        try:
            return hsm.decrypt(kek, sealed, Mechanism.AES_GCM, params)
        except pkcs11.PKCS11Error:
            # Modules report a wrong tag in many ways, a general error among them. One that still
            # encrypts and decrypts has its device, so it must be the bytes.
            probe = _gcm(os.urandom(_IV_BYTES), b"", "probe")
            sealed = hsm.encrypt(kek, b"probe", Mechanism.AES_GCM, probe)
            hsm.decrypt(kek, sealed, Mechanism.AES_GCM, probe)
        raise CryptoError(
            f"the wrapped key {context} does not open under the HSM's key-encryption key {label}"
        )

    def __repr__(self) -> str:
        return f"<Pkcs11Provider of {self._address.token_label}>"


# ---- the form of wrapped keys


def _head(label: str) -> bytes:
    encoded = label.encode()
    return FORMAT + bytes((len(encoded),)) + encoded


def _gcm(iv: bytes, head: bytes, context: str) -> GCMParams:
    return GCMParams(iv, head + _CONTEXT + context.encode(), _TAG_BITS)


def _parts(wrapped: bytes, context: str) -> tuple[str, bytes, bytes]:
    """The KEK's label, the IV, and what is sealed with its tag."""
    if wrapped.startswith(FORMAT) and len(wrapped) > 1:
        start = 2 + wrapped[1]
        label, iv, sealed = wrapped[2:start], wrapped[start:][:_IV_BYTES], wrapped[start:]
        sealed = sealed[_IV_BYTES:]
        if len(sealed) > _TAG_BITS // 8 and len(label) <= _LABEL_LIMIT_BYTES:
            return label.decode(errors="replace"), iv, sealed
    raise CryptoError(f"the wrapped key {context} is not in a form of provider pkcs11")


# ---- base derivation keys, on the thread of the HSM


def _keep(session: Session, *, bdk: bytes, scheme: str, name: str) -> KeptBdk:
    if scheme == TDES_DUKPT:
        # Some HSMs refuse a DES key without odd parity; DES itself takes no notice of it.
        value = odd_parity(bdk)
        right = (int.from_bytes(value, "big") ^ _C0_KEY).to_bytes(len(value), "big")
        objects = [(RIGHT_HALF_SUFFIX, KeyType.DES2, right), ("", KeyType.DES2, value)]
    else:
        objects = [("", KeyType.AES, bdk)]
    label = f"{name}-{key_check_value(bdk, scheme)}"
    for suffix, key_type, value in objects:
        _keep_one(session, label + suffix, key_type, value)
    return KeptBdk(hsm_label=label)


def _keep_one(session: Session, label: str, key_type: KeyType, value: bytes) -> None:
    """Make it, unless an import that was cut short has made it already."""
    scheme = AES_DUKPT if key_type == KeyType.AES else TDES_DUKPT
    found = hsm.find(session, label) or hsm.create(session, label, key_type, value)
    expected = key_check_value(value, scheme)
    if hsm.weakness(found) is not None or _kcv_inside(found, scheme) != expected:
        raise CryptoError(f"the HSM has an object {label} already, and it is not this key")


def _checked_kcv(session: Session, *, label: str, scheme: str) -> str:
    key = hsm.require(session, label, _label_error(f"the HSM has no secret key {label}"))
    key_type = key[Attribute.KEY_TYPE]
    fits = key_type in _TDES_TYPES if scheme == TDES_DUKPT else key_type == KeyType.AES
    if not fits:
        raise _label_error(f"the object {label} is of another kind than {scheme} needs")
    parts = [(label, key)]
    if scheme == TDES_DUKPT:
        second = label + RIGHT_HALF_SUFFIX
        message = (
            f"the HSM has no object {second}: the BDK XOR C0C0C0C000000000C0C0C0C000000000, "
            "from which the right half of initial keys is derived"
        )
        right = hsm.require(session, second, _label_error(message))
        if right[Attribute.KEY_TYPE] not in _TDES_TYPES:
            raise _label_error(f"the object {second} is of another kind than {scheme} needs")
        parts.append((second, right))
    for name, part in parts:
        weakness = hsm.weakness(part)
        if weakness is not None:
            raise _label_error(f"the object {name} {weakness}")
    return _kcv_inside(key, scheme)


def _derive_tdes(session: Session, *, label: str, key_id: bytes, missing: GlamError) -> bytes:
    """X9.24-1:2009, A.6: the eight leftmost bytes of the id under the BDK and under its variant."""
    serial = key_id[:TDEA_BLOCK_BYTES]
    left, right = (
        hsm.require(session, label + suffix, missing) for suffix in ("", RIGHT_HALF_SUFFIX)
    )
    return b"".join(hsm.encrypt(half, serial, Mechanism.DES3_ECB) for half in (left, right))


def _derive_aes(session: Session, *, label: str, key_id: bytes, missing: GlamError) -> bytes:
    """X9.24-3:2017, 6.3.1 and 6.3.3."""
    key = hsm.require(session, label, missing)
    key_type = _aes_type(key[Attribute.VALUE_LEN])
    data = dukpt_aes.initial_key_data(key_type, key_id)
    return hsm.encrypt(key, data, Mechanism.AES_ECB)[: key_type.length_bytes]


def _aes_type(length_bytes: int) -> dukpt_aes.KeyType:
    """The type of an AES BDK of this length."""
    return dukpt_aes.KeyType.of_derivation_key(bytes(length_bytes), "bdk")


def _kcv_inside(key: SecretKey, scheme: str) -> str:
    """The check value of `glamd.crypto.kcv`, of a key that only encrypts and does not come out."""
    if scheme == TDES_DUKPT:
        block = hsm.encrypt(key, bytes(TDEA_BLOCK_BYTES), Mechanism.DES3_ECB)
    else:
        # NIST SP 800-38B: one whole block of zeros is XORed with K1, which is then all there is.
        start = hsm.encrypt(key, bytes(AES_BLOCK_BYTES), Mechanism.AES_ECB)
        doubled = int.from_bytes(start, "big") << 1
        if doubled >> 128:
            doubled ^= 1 << 128 | 0x87
        first_subkey = doubled.to_bytes(AES_BLOCK_BYTES, "big")
        block = hsm.encrypt(key, first_subkey, Mechanism.AES_ECB)
    return block[: kcv.KCV_BYTES].hex().upper()


# ---- refusals


def _config(setting: str, message: str) -> ConfigError:
    field = f"keys.pkcs11_{setting}"
    return ConfigError(f"{field}: {message}.", fields=(FieldError(field, message),))


def _kek_error(message: str) -> CryptoError:
    return CryptoError(message, fields=(FieldError("keys.pkcs11_kek_label", message),))


def _label_error(message: str) -> InputError:
    return InputError(f"hsm_label: {message}", fields=(FieldError("hsm_label", message),))
