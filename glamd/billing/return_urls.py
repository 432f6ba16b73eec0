"""Where a merchant may be sent after paying. Pure.

Whoever chooses that address chooses where a merchant lands who has just paid and trusts the page,
with the charge's id in the address. So it is read by a narrow pattern and not by a URL parser:
parsers and browsers disagree about backslashes, blanks, users and ports, and what no two of them
read differently is enough for a shop's page.
"""

import re
from collections.abc import Collection
from typing import Final

from glamd.errors import FieldError, InputError

URL_LIMIT: Final = 2048

# The host ends at the first character that is none of its own; a user, a password, a port, a
# backslash or an escape in it leaves the pattern without a match. Letters beyond ASCII do so too.
_URL: Final = re.compile(
    r"https://([a-z0-9](?:[a-z0-9.-]*[a-z0-9])?)(?:[/?#][!#-;=?-\[\]_a-z~]*)?",
    re.ASCII | re.IGNORECASE,
)
_HOST: Final = re.compile(r"[a-z0-9](?:[a-z0-9-]*[a-z0-9])?(?:\.[a-z0-9](?:[a-z0-9-]*[a-z0-9])?)+")


def check_return_url(url: str, hosts: Collection[str]) -> None:
    """InputError with the field `return_url`, unless it is https and on one of these hosts.

    Hosts are compared whole and in lower case: none stands for those under it.
    """
    found = _URL.fullmatch(url) if len(url) <= URL_LIMIT else None
    if found is None:
        raise _wrong(f"it is an https URL of at most {URL_LIMIT} characters, without user and port")
    if found[1].lower() not in hosts:
        raise _wrong("its host is the shop's, or one that is configured")


def is_host(text: str) -> bool:
    """Whether it is a host name in lower case, as `check_return_url` compares them."""
    return len(text) <= 253 and _HOST.fullmatch(text) is not None


def _wrong(message: str) -> InputError:
    return InputError(
        "The merchant cannot be sent there.", fields=(FieldError("return_url", message),)
    )
