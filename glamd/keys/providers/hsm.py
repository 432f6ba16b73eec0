"""A token of an HSM, over PKCS#11: its session, the objects in it, and what is done with them.

Everything here blocks and runs on the one thread of `one_thread`. The session is opened at the
first use and again whenever it broke. Which keys there are, and what for, is for `pkcs11`.
"""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeVar

import pkcs11
from pkcs11 import (
    Attribute,
    DecryptMixin,
    EncryptMixin,
    GCMParams,
    KeyType,
    Mechanism,
    ObjectClass,
    SecretKey,
    Session,
)

from glamd.errors import (
    ConfigError,
    CryptoError,
    FieldError,
    GlamError,
    UnavailableError,
)
from glamd.keys.providers.secret_files import SecretFile

T = TypeVar("T")

_PROBE_BITS: Final = 64

_PIN_REFUSED: Final = (
    pkcs11.PinIncorrect,
    pkcs11.PinInvalid,
    pkcs11.PinLenRange,
    pkcs11.PinExpired,
    pkcs11.PinLocked,
    pkcs11.UserPinNotInitialized,
)
_PIN_FIELD: Final = FieldError("keys.pkcs11_pin_file", "holds a PIN that the token refuses")
_PROTECTED: Final = {
    Attribute.TOKEN: True,
    Attribute.PRIVATE: True,
    Attribute.SENSITIVE: True,
    Attribute.EXTRACTABLE: False,
    Attribute.MODIFIABLE: False,
    Attribute.ENCRYPT: True,
    Attribute.DECRYPT: False,
    Attribute.SIGN: False,
    Attribute.VERIFY: False,
    Attribute.WRAP: False,
    Attribute.UNWRAP: False,
    Attribute.DERIVE: False,
}
"""Of each object made here: it stays where it is, and encrypts; a KEK decrypts as well."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenAddress:
    """Where the token is: the vendor's module, the token's label, the file with the user's PIN."""

    module: Path
    token_label: str
    pin_file: Path

    def pin(self) -> str:
        """The PIN; ConfigError where the file is not as a secret's must be."""
        file = SecretFile(self.pin_file, "The HSM's PIN", "keys.pkcs11_pin_file")
        try:
            pin = file.read().decode().strip()
        except UnicodeDecodeError:
            raise file.wrong(f"{self.pin_file} does not hold text") from None
        if not pin:
            raise file.wrong(f"{self.pin_file} is empty")
        return pin


class Hsm:
    """A session with one token, by one thread."""

    def __init__(self, address: TokenAddress) -> None:
        self._address = address
        self._session: Session | None = None
        self._refused: str | None = None

    def run(self, work: Callable[[Session], T]) -> T:
        """What `work` returns; a session that broke is opened again, and `work` done once more.

        So `work` must be such that twice is as good as once. UnavailableError where the token is
        away; CryptoError where it refuses the PIN.
        """
        try:
            return work(self._open())
        except (pkcs11.PKCS11Error, _GoneError):
            # Tokens say in a dozen ways that they were away; only a second try tells what it was.
            self.close()
        try:
            return work(self._open())
        except _GoneError as gone:
            raise gone.error from None
        except pkcs11.PKCS11Error as error:
            self.close()
            raise self._away(error) from None

    def close(self) -> None:
        """End the session, if there is one; what a broken one says to it is of no interest."""
        session, self._session = self._session, None
        if session is not None:
            with contextlib.suppress(pkcs11.PKCS11Error):
                session.close()

    def _open(self) -> Session:
        if self._session is None:
            if self._refused is not None:
                raise CryptoError(self._refused, fields=(_PIN_FIELD,))
            try:
                self._session = self._login()
            except _PIN_REFUSED as error:
                # Each further try would bring the token nearer to locking itself.
                self._refused = (
                    f"the HSM's token {self._address.token_label} refuses the PIN "
                    f"({type(error).__name__}); correct keys.pkcs11_pin_file and start glamd again"
                )
                raise CryptoError(self._refused, fields=(_PIN_FIELD,)) from None
        else:
            # A session that broke shows here. Were it to show in a search for an object, then
            # python-pkcs11 would complain on stderr besides, when it cleans the search up.
            self._session.generate_random(_PROBE_BITS)
        return self._session

    def _login(self) -> Session:
        try:
            pin = self._address.pin()
        except ConfigError as error:
            # It was right at the start; putting it right again needs no other one.
            raise UnavailableError(error.message) from None
        try:
            return self._logged_in(pin)
        except _PIN_REFUSED:
            raise
        except pkcs11.PKCS11Error:
            # A module that lost its device may need to be begun anew to find it again.
            library = pkcs11.lib(str(self._address.module))
            with contextlib.suppress(pkcs11.PKCS11Error):
                library.finalize()
            library.initialize()
            return self._logged_in(pin)

    def _logged_in(self, pin: str) -> Session:
        token = pkcs11.lib(str(self._address.module)).get_token(
            token_label=self._address.token_label
        )
        try:
            return token.open(rw=True, user_pin=pin)
        except pkcs11.UserAlreadyLoggedIn:
            # The login is the process's, so that another session's serves this one as well.
            return token.open(rw=True)

    def _away(self, error: pkcs11.PKCS11Error) -> UnavailableError:
        said = str(error) or type(error).__name__
        return UnavailableError(
            f"The HSM's token {self._address.token_label} cannot be used now ({said})."
        )

    def __repr__(self) -> str:
        return f"<Hsm {self._address.token_label}>"


class _GoneError(Exception):
    """An object that has to be there is not: it never was, or the session lost its token."""

    def __init__(self, error: GlamError) -> None:
        super().__init__(error.message)
        self.error = error


def require(session: Session, label: str, error: GlamError) -> SecretKey:
    """The secret key with this label; where it is missing in a fresh session too, `error`."""
    found = find(session, label)
    if found is None:
        raise _GoneError(error)
    return found


def find(session: Session, label: str) -> SecretKey | None:
    """The secret key with this label, or None; of several, which two nodes may have made, one."""
    template = {Attribute.CLASS: ObjectClass.SECRET_KEY, Attribute.LABEL: label}
    found: SecretKey | None = None
    for entry in session.get_objects(template):  # to its end: a search that is left stays open
        if found is None and isinstance(entry, SecretKey):
            found = entry
    return found


def weakness(key: SecretKey) -> str | None:
    """Why this object is not fit to hold a key that must never leave the HSM; None where it is."""
    if key[Attribute.EXTRACTABLE]:
        return "is extractable (CKA_EXTRACTABLE)"
    if not key[Attribute.SENSITIVE]:
        return "is not sensitive (CKA_SENSITIVE)"
    if not key[Attribute.PRIVATE]:
        return "is there for whoever has not logged in, too (CKA_PRIVATE)"
    if not key[Attribute.ENCRYPT]:
        return "does not encrypt (CKA_ENCRYPT)"
    return None


def encrypt(
    key: SecretKey, data: bytes, mechanism: Mechanism, params: GCMParams | None = None
) -> bytes:
    """Encrypt in the HSM; CryptoError for a key that is not for it."""
    if not isinstance(key, EncryptMixin):
        raise CryptoError("the HSM's object is not for encrypting (CKA_ENCRYPT)")
    return _whole(key.encrypt(data, mechanism=mechanism, mechanism_param=params))


def decrypt(key: SecretKey, data: bytes, mechanism: Mechanism, params: GCMParams) -> bytes:
    """Decrypt in the HSM; CryptoError for a key that is not for it."""
    if not isinstance(key, DecryptMixin):
        raise CryptoError("the HSM's object is not for decrypting (CKA_DECRYPT)")
    return _whole(key.decrypt(data, mechanism=mechanism, mechanism_param=params))


def _whole(answer: object) -> bytes:
    assert isinstance(answer, bytes), "only what is asked for in parts comes in parts"
    return answer


def create(session: Session, label: str, key_type: KeyType, value: bytes) -> SecretKey:
    """Put a key into the token, from where it does not come out again."""
    template = {
        **_PROTECTED,
        Attribute.CLASS: ObjectClass.SECRET_KEY,
        Attribute.KEY_TYPE: key_type,
        Attribute.LABEL: label,
        Attribute.VALUE: value,
    }
    made = session.create_object(template)
    assert isinstance(made, SecretKey), "the class in the template says so"
    return made


def generate_kek(session: Session, label: str) -> SecretKey:
    """Have the token make a key-encryption key (AES-256) by itself."""
    template = {**_PROTECTED, Attribute.DECRYPT: True}
    return session.generate_key(KeyType.AES, 256, label=label, store=True, template=template)
