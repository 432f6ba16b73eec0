"""Keys that a provider takes are taken only when it gives them back.

A provider may be allowed to wrap and not to unwrap, as by a policy; then the key would be lost, and
whoever typed its components has gone home. Which provider it is, and what becomes of what it gave,
is the caller's.
"""

import hmac

from glamd.crypto import dukpt
from glamd.errors import CryptoError
from glamd.keys.providers.interface import KeptBdk, KeyProvider


async def wrap(provider: KeyProvider, key: bytes, *, context: str) -> bytes:
    """The key wrapped; CryptoError where it does not come back, and as `KeyProvider.wrap`."""
    wrapped = await provider.wrap(key, context=context)
    if not hmac.compare_digest(await provider.unwrap(wrapped, context=context), key):
        raise CryptoError(f"the key provider {provider.name} does not give {context} back")
    return wrapped


async def keep_bdk(provider: KeyProvider, bdk: bytes, *, scheme: str, context: str) -> KeptBdk:
    """The BDK as the provider keeps it; CryptoError where it does not derive from it then."""
    kept = await provider.keep_bdk(bdk, scheme=scheme, context=context)
    ksn = bytes(dukpt.ksn_length_bytes(scheme))
    derived = await provider.initial_key(kept, scheme=scheme, ksn=ksn, context=context)
    if not hmac.compare_digest(derived, dukpt.initial_key(scheme, bdk, ksn)):
        raise CryptoError(f"the key provider {provider.name} does not derive from {context}")
    return kept
