"""Where a request came from: the peer, or what trusted proxies say about it.

`X-Forwarded-For` is believed only as far as it was written by proxies that the operator named;
whatever a caller puts there by itself is never reached.
"""

from collections.abc import Sequence
from functools import lru_cache
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address
from typing import NamedTuple

from aiohttp import web

Network = IPv4Network | IPv6Network

MAX_HOPS = 16
MAX_REMEMBERED = 4096
"""Addresses kept parsed: proxies and their callers come again and again."""


class ClientAddress:
    """Reads the caller's address of a request, given the networks of trusted proxies."""

    def __init__(self, trusted_proxies: Sequence[Network] = ()) -> None:
        self._trusted = tuple(trusted_proxies)

    def of(self, request: web.BaseRequest, *, headers: bool = True) -> str:
        """The caller's address as text; `-` for a unix socket.

        `headers` False is for a request that was not valid HTTP: only its peer is known then.
        """
        peer = request.protocol.peername
        if not isinstance(peer, tuple):
            return "-"
        hop = _parse(str(peer[0]))
        if hop is None:
            return "-"
        if headers and self._trusted and self._is_trusted(hop.address):
            hop = self._behind(hop, request.headers.getall("X-Forwarded-For", []))
        return hop.text

    def _behind(self, proxy: "_Hop", headers: list[str]) -> "_Hop":
        """The nearest hop, read from the right, that no trusted proxy vouches for."""
        hops = ",".join(headers).split(",")[-MAX_HOPS:]
        nearest = proxy
        for hop in reversed(hops):
            found = _parse(hop.strip())
            if found is None:
                return nearest
            nearest = found
            if not self._is_trusted(nearest.address):
                return nearest
        return nearest

    def _is_trusted(self, address: IPv4Address | IPv6Address) -> bool:
        return any(address in network for network in self._trusted)


class _Hop(NamedTuple):
    """An address, and how it is written."""

    address: IPv4Address | IPv6Address
    text: str


@lru_cache(maxsize=MAX_REMEMBERED)
def _parse(text: str) -> _Hop | None:
    try:
        address = ip_address(text)
    except ValueError:
        return None
    if isinstance(address, IPv6Address) and address.ipv4_mapped is not None:
        address = address.ipv4_mapped
    return _Hop(address, str(address))
