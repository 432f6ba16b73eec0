"""Bytes in, bytes out: DUKPT, MACs, key check values and sealing, each with its clause beside it.

What lives here is arithmetic over keys that somebody else holds: no asyncio, no database, no
clock, no log, and no idea of what a card is. Where keys come from and how long they stay is the
business of `glamd.keys`; which counter a device may still use, that of `glamd.payments`.

How far erasing goes. What is decrypted comes back in a `bytearray`, for the caller to overwrite.
Keys are `bytes`: what is derived comes out of `cryptography` as such. Dropping the last reference
frees them, and nothing in Python can overwrite them (OpenSSL erases its own copies). So keep swap
and core dumps off.
"""
