"""`/openapi.json` and `/docs` without a browser: files, headers, and nothing from elsewhere."""

import hashlib
import re
from typing import cast

import pytest

from glamd.errors import NotFoundError
from glamd.http.call import Call, Raw
from glamd.http.docs_page import CONTENT_SECURITY_POLICY, FILES, FOLDER, docs_routes
from glamd.http.routes import RouteTable

DOCUMENT = b'{"openapi": "3.1.0"}'
TABLE = RouteTable(docs_routes(DOCUMENT))


class Asked:
    """As much of a call as these handlers look at."""

    def __init__(self, params: dict[str, str]) -> None:
        self.params = params


async def get(path: str, table: RouteTable = TABLE) -> Raw:
    """The answer at a path; nobody is asked who they are."""
    route, params = table.find("GET", path)
    assert route.public
    answer = await route.handler(cast("Call", Asked(params)))
    assert isinstance(answer, Raw)
    return answer


@pytest.mark.parametrize(
    "name",
    [
        "README.md",
        "docs.html",
        "..%2fdocs_page.py",
        "%2e%2e",
        "SWAGGER-UI.CSS",
        "docs.js%00",
        "%20",
    ],
)
async def test_a_file_that_is_not_part_of_the_page_is_not_there(name: str) -> None:
    with pytest.raises(NotFoundError):
        await get(f"/docs/{name}")


async def test_nothing_below_a_file_or_beside_the_page_is_there() -> None:
    for path in ("/docs/", "/docs/docs.js/", "/docs/docs.js/x", "/openapi.json/", "/openapi.yaml"):
        with pytest.raises(NotFoundError):
            await get(path)


async def test_the_page_has_no_script_and_no_style_of_its_own_and_asks_only_for_what_is_here() -> (
    None
):
    page = (await get("/docs")).body.decode()
    assert not re.search(r"<script>|<style|style=|javascript:| on\w+=", page)
    wanted = re.findall(r'(?:src|href)="([^"]*)"', page)
    assert len(wanted) == 5
    for address in wanted:
        path, _, query = address.partition("?")
        assert (await get(f"/{path}")).body
        assert re.fullmatch(r"v=[0-9a-f]{12}", query)
    assert {address.partition("?")[0].removeprefix("docs/") for address in wanted} == set(FILES)


async def test_the_page_is_held_to_this_listener() -> None:
    headers = (await get("/docs")).headers
    assert headers["Content-Security-Policy"] == CONTENT_SECURITY_POLICY
    policy = dict(part.split(" ", 1) for part in CONTENT_SECURITY_POLICY.split("; "))
    assert policy["default-src"] == "'none'"
    assert policy["script-src"] == policy["connect-src"] == "'self'"
    assert "http" not in CONTENT_SECURITY_POLICY


async def test_files_may_be_kept_for_long_and_what_names_them_may_not() -> None:
    assert "immutable" in (await get("/docs/swagger-ui.css")).headers["Cache-Control"]
    assert (await get("/docs")).headers["Cache-Control"] == "no-cache"
    assert (await get("/openapi.json")).headers["Cache-Control"] == "no-cache"


async def test_each_file_says_what_it_is() -> None:
    kinds = {name: (await get(f"/docs/{name}")).content_type.partition(";")[0] for name in FILES}
    assert kinds == {
        "docs.css": "text/css",
        "docs.js": "text/javascript",
        "favicon-32x32.png": "image/png",
        "swagger-ui-bundle.js": "text/javascript",
        "swagger-ui.css": "text/css",
    }


async def test_the_document_is_served_as_it_is_with_a_tag_that_is_its_own() -> None:
    answer = await get("/openapi.json")
    assert (answer.body, answer.content_type) == (DOCUMENT, "application/json")
    again = await get("/openapi.json", RouteTable(docs_routes(b"{}")))
    assert again.headers["ETag"] != answer.headers["ETag"]
    assert re.fullmatch(r'"[0-9a-f]{32}"', answer.headers["ETag"])


async def test_the_vendored_files_are_those_of_the_release() -> None:
    lines = (FOLDER / "SHA256SUMS").read_text().splitlines()
    sums = {name: expected for expected, _, name in (line.partition("  ") for line in lines)}
    assert {"swagger-ui-bundle.js", "swagger-ui.css", "LICENSE", "NOTICE"} <= set(sums)
    for name, expected in sums.items():
        assert hashlib.sha256((FOLDER / name).read_bytes()).hexdigest() == expected, name
