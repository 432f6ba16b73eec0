"""Cross-origin requests from browsers: closed, but for the exact origins that were configured.

No wildcard, no `null`, no credentials: callers bring their token in a header, and a page that is
not named here learns nothing, not even that an answer was an error. Only the api listener has this.
"""

from collections.abc import Iterable, Mapping
from typing import Final

from aiohttp import web

from glamd.errors import ConfigError
from glamd.origins import MAX_ORIGINS, is_origin

MAX_AGE_S: Final = 600

REQUEST_HEADERS: Final = (
    "Authorization",
    "Content-Type",
    "Idempotency-Key",
    "X-Correlation-ID",
    "X-Request-ID",
    "X-Shop-Domain",
    "X-Shop-Platform",
)
RESPONSE_HEADERS: Final = (
    "Idempotent-Replayed",
    "Retry-After",
    "X-Correlation-ID",
    "X-Request-ID",
)

_VARY: Final[Mapping[str, str]] = {"Vary": "Origin"}


class Cors:
    """The origins that may ask from a browser."""

    def __init__(self, origins: Iterable[str]) -> None:
        """Raises `ConfigError` for what is no exact origin as a browser writes it."""
        names = tuple(origins)
        if len(names) > MAX_ORIGINS:
            raise ConfigError(f"More than {MAX_ORIGINS} origins for CORS.")
        for name in names:
            if not is_origin(name):
                raise ConfigError(
                    f"{name!r} is no origin for CORS: it should be like https://shop.example, with "
                    "http only on loopback, in lower case, without a path or a wildcard."
                )
        self._headers = {
            name: {
                "Access-Control-Allow-Origin": name,
                "Access-Control-Expose-Headers": ", ".join(RESPONSE_HEADERS),
                **_VARY,
            }
            for name in names
        }

    def headers(self, request: web.BaseRequest) -> Mapping[str, str]:
        """What an answer to this request carries, an error too."""
        return self._headers.get(_origin(request), _VARY)

    def preflight(self, request: web.BaseRequest, allow: Iterable[str]) -> Mapping[str, str] | None:
        """What the answer to a preflight carries beside `headers`; None where this is none.

        `allow` are the methods of the path.
        """
        if request.method != "OPTIONS" or "Access-Control-Request-Method" not in request.headers:
            return None
        if _origin(request) not in self._headers:
            return None
        return {
            "Access-Control-Allow-Methods": ", ".join(allow),
            "Access-Control-Allow-Headers": ", ".join(REQUEST_HEADERS),
            "Access-Control-Max-Age": str(MAX_AGE_S),
        }


def _origin(request: web.BaseRequest) -> str:
    headers = request.headers
    # What never became a request has no headers, and aiohttp a plain dict for them.
    found = headers.getall("Origin", ()) if headers else ()
    return found[0] if len(found) == 1 else ""
