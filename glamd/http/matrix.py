"""Who may call what, as the table in `docs/api.md`: `python -m glamd.http.matrix docs/api.md`.

Made from the route tables, so that the page cannot say anything else than the daemon does; nothing
is decided here. The tests walk the same tables with every identity.
"""

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from glamd.http.identity import Kind
from glamd.http.openapi import api_routes, worker_routes
from glamd.http.routes import Access, Route

BEGIN: Final = "<!-- matrix: written by `make docs` -->"
END: Final = "<!-- end of matrix -->"

_KINDS: Final[tuple[Kind, ...]] = ("client", "internal", "worker", "device")
_OWNED: Final = {
    "own": "its own merchant's",
    "any": "any merchant's",
    "grant": "of the merchants in its grant",
    "nobody's": "yes",
}


def table() -> str:
    """The matrix of both listeners in Markdown."""
    lines = [
        "| method and path | listener | no identity | client | internal | worker | device |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        *_rows(api_routes(), "api"),
        *_rows(worker_routes(), "worker"),
    ]
    return "\n".join(lines)


def put_into(page: str) -> str:
    """The page with the matrix as it is now between its two marks."""
    before, mark, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (mark and end):
        sys.exit(f"The page needs the marks {BEGIN} and {END}.")
    return f"{before}{BEGIN}\n{table()}\n{END}{after}"


def _rows(routes: Iterable[Route], listener: str) -> Iterable[str]:
    for route in sorted(routes, key=lambda route: (route.public, route.path, route.method)):
        access = {one.kind: one for one in route.access}
        cells = ["yes" if route.public else "401"]
        cells += [_cell(access.get(kind), public=route.public) for kind in _KINDS]
        if listener == "worker":
            # Nobody without a certificate gets as far as HTTP there.
            cells[:3] = ["no TLS"] * 3
        elif not route.public:
            # A certificate says nothing here, where nobody is asked for one.
            cells[3:] = ["401"] * 2
        yield f"| `{route.method} {route.path}` | {listener} | {' | '.join(cells)} |"


def _cell(access: Access | None, *, public: bool) -> str:
    if public:
        return "yes"
    if access is None:
        return "403"
    words = [_OWNED[access.owner]]
    if access.scopes:
        words.append("with " + ", ".join(f"`{scope}`" for scope in sorted(access.scopes)))
    if access.services is not None:
        words.append("only `credentials.readers`")
    return "; ".join(words)


if __name__ == "__main__":
    file = Path(sys.argv[1])
    file.write_text(put_into(file.read_text()))
