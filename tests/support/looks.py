"""A tap that becomes a token, a worker's look at it, and what the audit log says about that.

For tests with a whole daemon (`tests.support.site`); every step is taken over the wire.
"""

import secrets
import ssl
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import aiohttp
import orjson

from device_gateway.terminal_card import DemoCard, clear_form
from device_gateway.terminal_device import Device
from glamd.embedded.settings import LOOPBACK
from glamd.payments.model import Format
from tests.support.site import VISA, Site, reader

CARD = DemoCard(pan=VISA, expiry="4912", name="TESTER/TERRY", service_code="201")
GOOD: Mapping[str, object] = {"purpose": "settlement", "fields": ["pan", "expiry"]}
CLEAR = {"pan": VISA, "expiry": "4912"}
"""What a good look at `CARD` gets."""


@dataclass(frozen=True, slots=True)
class Reply:
    """An answer over HTTP, read whole."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> dict[str, object]:
        """The body."""
        found: dict[str, object] = orjson.loads(self.body)
        return found

    @property
    def data(self) -> object:
        """What a success is about."""
        return self.json["data"]

    @property
    def outcome(self) -> tuple[int, str]:
        """Status and code: `ok` for a success."""
        return self.status, "ok" if self.status < 400 else cast("str", self.json["code"])


async def read(response: aiohttp.ClientResponse) -> Reply:
    """The whole answer."""
    async with response:
        return Reply(response.status, response.headers, await response.read())


def taps(device: Device, *, card: DemoCard = CARD, form: Format = "track2") -> bytes:
    """A request of this device with an id of its own."""
    return reader(device).request(secrets.token_hex(8), clear_form(card, form), form)


async def tap(
    site: Site, device: Device | None = None, *, card: DemoCard = CARD, form: Format = "track2"
) -> str:
    """Tap a card on a terminal, a new one unless it is named, and return the token."""
    device = device or await site.enroll()
    answer = await site.ask(device, taps(device, card=card, form=form))
    assert answer.ok, answer
    return answer.text("token")


async def look(
    worker: aiohttp.ClientSession,
    token: str,
    body: object = GOOD,
    *,
    headers: Mapping[str, str] | None = None,
) -> Reply:
    """A worker's `decrypt` of this token; `body` as bytes goes out as it is."""
    raw = body if isinstance(body, bytes) else orjson.dumps(body)
    sent = {"Content-Type": "application/json", **(headers or {})}
    path = f"/internal/v1/payment-tokens/{token}/decrypt"
    return await read(await worker.post(path, data=raw, headers=sent))


@asynccontextmanager
async def worker_with(
    site: Site, certificate: Path | None, key: Path | None = None
) -> AsyncIterator[aiohttp.ClientSession]:
    """A client of the workers' listener with this certificate, or with none."""
    tls = ssl.create_default_context(cafile=str(site.certificates.server_ca.certificate_file))
    if certificate is not None:
        tls.load_cert_chain(certificate, key)
    async with aiohttp.ClientSession(
        f"https://{LOOPBACK}:{site.daemon.worker_port}", connector=aiohttp.TCPConnector(ssl=tls)
    ) as session:
        yield session


@asynccontextmanager
async def worker_named(
    site: Site, uri: str = "spiffe://glamd/worker/settler"
) -> AsyncIterator[aiohttp.ClientSession]:
    """A worker with a certificate of the workers' authority that says this URI."""
    made = site.certificates.worker(uri)
    async with worker_with(site, made.certificate_file, made.key_file) as session:
        yield session


async def authorized(
    worker: aiohttp.ClientSession, token: str, raw: bytes = b"", **headers: str
) -> Reply:
    """A worker's report that the payment with this token is authorized."""
    path = f"/internal/v1/payment-tokens/{token}/authorized"
    return await read(await worker.post(path, data=raw, headers=headers))


async def audited(site: Site, action: str = "decrypt") -> list[dict[str, object]]:
    """The rows about looks at cards, or about another action, oldest first."""
    rows = await site.database.fetch(
        "SELECT actor, certificate_sha256, ip, subject, fields, purpose, outcome, correlation_id"
        " FROM cde.decrypt_audit_log WHERE action = $1 ORDER BY month, seq",
        action,
    )
    return [dict(row) for row in rows]


async def outcomes(site: Site) -> Sequence[object]:
    """The outcomes of all looks, oldest first."""
    return [row["outcome"] for row in await audited(site)]


async def verified(site: Site) -> dict[str, object]:
    """What a walk of the whole audit chain finds, as an operator is told it."""
    response = await site.admin.post("/v1/audit/verify")
    found: dict[str, object] = await response.json()
    return found
