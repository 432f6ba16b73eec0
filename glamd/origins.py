"""What an origin for CORS may look like: one rule for the settings and for who goes by them.

A pure rule on text, below both. What is done with origins is `glamd.http.cors`'s.
"""

import re
from typing import Final

MAX_ORIGINS: Final = 64

_LABEL = r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?"
_PORT = r"(?::[1-9][0-9]{0,4})?"
_ORIGIN = re.compile(
    rf"https://(?:{_LABEL}(?:\.{_LABEL})*|\[[0-9a-f:]+\]){_PORT}"
    rf"|http://(?:localhost|127\.0\.0\.1|\[::1\]){_PORT}"
)


def is_origin(text: str) -> bool:
    """Whether this is an exact origin as browsers write it (RFC 6454, 6.2).

    That is scheme, host and an unusual port, in lower case, without a path or a wildcard: over
    https, or over http on loopback.
    """
    return _ORIGIN.fullmatch(text) is not None
