"""The published document beside a running daemon: served, and true of every answer it gives."""

import asyncio
from pathlib import Path
from typing import Any
from uuid import uuid4

import aiohttp
import orjson
import pytest

import glamd
from glamd.embedded.settings import WORKER_URI
from glamd.http.docs_page import CONTENT_SECURITY_POLICY
from tests.support.fuzzing import UNSIGNED, Asker, everybody, fuzz
from tests.support.looks import tap
from tests.support.site import DOMAIN, Site

CHECKED_IN = Path(glamd.__file__).parent.parent / "docs" / "openapi.json"
CASES = 10
"""Drawn for each operation and caller, beside every boundary that its schema has."""
SEED = 1


async def test_the_document_is_served_bare_to_everybody_as_it_is_checked_in(site: Site) -> None:
    async with site.http.get("/openapi.json") as response:
        assert response.status == 200
        assert response.content_type == "application/json"
        assert await response.read() == CHECKED_IN.read_bytes()
    async with site.http.head("/openapi.json") as response:
        assert response.status == 200
    for path in ("/openapi.json", "/docs"):
        async with site.worker.get(path) as response:
            assert response.status == 404


async def test_the_page_has_its_own_policy_in_place_of_that_of_every_other_answer(
    site: Site,
) -> None:
    async with site.http.get("/docs") as response:
        assert response.headers.getall("Content-Security-Policy") == [CONTENT_SECURITY_POLICY]
        assert response.headers.getall("Cache-Control") == ["no-cache"]
        assert response.headers["X-Content-Type-Options"] == "nosniff"
    async with site.http.get("/docs/..%2fdocs.html") as response:
        assert response.status == 404
        assert "script-src" not in response.headers["Content-Security-Policy"]


@pytest.mark.timeout(240)
async def test_no_answer_of_either_listener_is_one_that_the_document_does_not_have(
    site: Site,
) -> None:
    async with site.http.get("/openapi.json") as response:
        document = await response.json()
    real = await known(site)
    found = await asyncio.to_thread(fuzz, document, askers(site), real=real, cases=CASES, seed=SEED)
    assert not found.failures, "\n\n".join(found.failures[:5])
    assert set(found.cases) == labels(document)
    assert min(found.cases.values()) > CASES
    # Otherwise it would be the refusals alone that were looked at.
    assert {label for label, status in found.answers if status < 300} == labels(document) - UNSIGNED


@pytest.mark.parametrize("lie", ["status", "shape", "header", "type", "method"])
async def test_an_answer_that_the_document_does_not_have_is_found(site: Site, lie: str) -> None:
    document = orjson.loads(CHECKED_IN.read_bytes())
    answers = document["paths"]["/healthz"]["get"]["responses"]
    match lie:
        case "status":
            answers["201"] = answers.pop("200")
        case "shape":
            meta = document["components"]["schemas"]["Meta"]
            meta["required"].remove("timestamp")
            del meta["properties"]["timestamp"]
        case "header":
            answers["200"]["headers"]["X-Shoe-Size"] = {"required": True, "schema": {}}
        case "type":
            answers["200"]["content"] = {"text/plain": {}}
        case "method":
            document["paths"]["/healthz"]["delete"] = {
                **document["paths"]["/healthz"]["get"],
                "operationId": "kill",
            }
    asker = Asker(name="nobody", url=url_of(site.http))
    only = {**document, "paths": {"/healthz": document["paths"]["/healthz"]}}
    found = await asyncio.to_thread(fuzz, only, [asker], real={}, cases=1, seed=SEED)
    assert found.failures


def labels(document: dict[str, Any]) -> set[str]:
    """Every operation of the document, as schemathesis calls it."""
    return {
        f"{method.upper()} {path}"
        for path, methods in document["paths"].items()
        for method in methods
    }


def askers(site: Site) -> tuple[Asker, ...]:
    """Everybody who may ask this site."""
    worker = site.certificates.worker(WORKER_URI)
    return everybody(
        api_url=url_of(site.http),
        worker_url=url_of(site.worker),
        client=site.client(),
        internal=site.internal("payment:read payment:revoke payment:tokenize credits:write"),
        certificate=worker.certificate_file,
        key=worker.key_file,
        server_ca=site.certificates.server_ca.certificate_file,
    )


def url_of(session: aiohttp.ClientSession) -> str:
    """Where a session of the site leads."""
    assert session._base_url is not None
    return str(session._base_url).rstrip("/")


async def known(site: Site) -> dict[str, list[str]]:
    """What there really is: a live token, a revoked and an expired one, and what goes with it."""
    device = await site.enroll()
    live, revoked, expired = [await tap(site, device) for _ in range(3)]
    path = f"/api/v1/payment-tokens/{revoked}"
    async with site.http.delete(path, headers=site.client()) as response:
        assert response.status == 200
    await site.database.execute(
        "UPDATE cde.payment_tokens SET created_at = created_at - interval '2 days',"
        " expires_at = now() - interval '1 day' WHERE token = $1",
        expired,
    )
    bought = {"pack": "small", "platform": "custom", "return_url": f"https://{DOMAIN}/"}
    path = "/api/billing/purchases"
    async with site.http.post(path, json=bought, headers=site.client()) as response:
        purchase = (await response.json())["data"]["purchase_id"]
    mine = str(site.merchant_id)
    return {
        "token": [live, live, revoked, expired],
        # The second is nobody's, or somebody else's: the same to whoever asks.
        "merchant_id": [mine, mine, str(uuid4())],
        "domain": [DOMAIN],
        "device_id": [device.device_id],
        "purpose": ["settlement"],
        "id": [purchase, purchase, str(uuid4())],
        **{name: [value] for name, value in bought.items()},
    }
