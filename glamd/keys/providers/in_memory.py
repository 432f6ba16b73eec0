"""What providers have in common that cannot derive: the BDK is unwrapped into this process for it.

A P2PE assessment does not accept that; `pkcs11` with a certified HSM is for those who need one.
"""

from typing_extensions import override

from glamd.crypto import dukpt
from glamd.errors import CryptoError, FieldError, InputError
from glamd.keys.providers.interface import KeptBdk, KeyProvider


class BdksInMemory(KeyProvider):
    """A provider that wraps and unwraps only; a BDK is in the clear here while it is derived from.

    Python cannot overwrite what it was: see docs/security.md.
    """

    @override
    async def keep_bdk(self, bdk: bytes, *, scheme: str, context: str) -> KeptBdk:
        """Wrap it, whatever the scheme."""
        return KeptBdk(wrapped=await self.wrap(bdk, context=context))

    @override
    async def bdk_kcv(self, hsm_label: str, *, scheme: str) -> str:
        """InputError (`hsm_label`): there are no objects here."""
        message = f"the key provider {self.name} keeps no keys of its own; this is for pkcs11"
        raise InputError(f"hsm_label: {message}", fields=(FieldError("hsm_label", message),))

    @override
    async def initial_key(self, bdk: KeptBdk, *, scheme: str, ksn: bytes, context: str) -> bytes:
        """Derived in this process."""
        if bdk.wrapped is None:
            raise CryptoError(f"the key {context} is inside an HSM, not of provider {self.name}")
        return dukpt.initial_key(scheme, await self.unwrap(bdk.wrapped, context=context), ksn)
