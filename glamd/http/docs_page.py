"""`/openapi.json` and `/docs`: the published document, for programs and in a browser.

Swagger UI stands beside this file and is served from memory; the page asks nobody but this
listener, and its content security policy holds it to that. All of it is for anybody and some of it
is large, so an address has it at its rate only. What is in the document is `openapi`'s.
"""

import hashlib
from pathlib import Path
from typing import Final

from glamd.errors import NotFoundError
from glamd.http.call import Call, Raw
from glamd.http.operation import Operation, Param, Refusal
from glamd.http.routes import Route

FOLDER: Final = Path(__file__).parent / "swagger"

_TYPES: Final = {
    "docs.css": "text/css; charset=utf-8",
    "docs.js": "text/javascript; charset=utf-8",
    "favicon-32x32.png": "image/png",
    "swagger-ui-bundle.js": "text/javascript; charset=utf-8",
    "swagger-ui.css": "text/css; charset=utf-8",
}
FILES: Final = tuple(sorted(_TYPES))

CONTENT_SECURITY_POLICY: Final = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        # Swagger UI has its arrows and locks as pictures in its style sheet.
        "img-src 'self' data:",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    )
)
_PAGE_HEADERS: Final = {
    "Cache-Control": "no-cache",
    "Content-Security-Policy": CONTENT_SECURITY_POLICY,
}
# The page names files with a hash of them all in the query, so an old one is never taken for new.
_FILE_HEADERS: Final = {"Cache-Control": "public, max-age=31536000, immutable"}

_RATIONED: Final = (
    Refusal(
        code="RATE_LIMITED",
        status=429,
        when="The caller's address asks too often; `Retry-After` says how many seconds to wait.",
    ),
)

_DOCUMENT: Final = Operation(
    id="showDocument",
    tag="Documentation",
    summary="This document",
    answer=dict[str, object],
    example={"openapi": "3.1.0", "info": {"title": "glamd", "version": "1.0.0"}, "paths": {}},
    bare=True,
    refusals=_RATIONED,
)
_PAGE: Final = Operation(
    id="showDocumentation",
    tag="Documentation",
    summary="This document as a page to read and to try",
    answer=str,
    example="<!doctype html>…",
    media_type="text/html",
    refusals=_RATIONED,
)
_FILE: Final = Operation(
    id="showDocumentationFile",
    tag="Documentation",
    summary="A file of that page",
    params={"file": Param(description="Its name.", example="docs.js", choices=FILES)},
    answer=bytes,
    example=b"",
    media_type="*/*",
    refusals=_RATIONED,
)


def docs_routes(document: bytes) -> tuple[Route, ...]:
    """The public routes of the document and its page; files are read now and never again."""
    # The default is to keep nothing; a document without secrets may be kept and asked about.
    document_headers = {
        "Cache-Control": "no-cache",
        "ETag": f'"{hashlib.sha256(document).hexdigest()[:32]}"',
    }
    files = {name: (FOLDER / name).read_bytes() for name in FILES}
    version = hashlib.sha256(b"".join(files.values())).hexdigest()[:12]
    page = (FOLDER / "docs.html").read_bytes().replace(b"{version}", version.encode())

    async def show_document(_call: Call) -> Raw:
        return Raw(
            body=document,
            content_type="application/json",
            headers=document_headers,
            rationed=True,
        )

    async def show_page(_call: Call) -> Raw:
        return Raw(
            body=page,
            content_type="text/html; charset=utf-8",
            headers=_PAGE_HEADERS,
            rationed=True,
        )

    async def show_file(call: Call) -> Raw:
        name = call.params["file"]
        if name not in files:
            raise NotFoundError("There is no such file.")
        return Raw(
            body=files[name], content_type=_TYPES[name], headers=_FILE_HEADERS, rationed=True
        )

    return (
        Route(
            method="GET",
            path="/openapi.json",
            handler=show_document,
            access=(),
            operation=_DOCUMENT,
        ),
        Route(method="GET", path="/docs", handler=show_page, access=(), operation=_PAGE),
        Route(method="GET", path="/docs/{file}", handler=show_file, access=(), operation=_FILE),
    )
