"""In-memory stand-ins for what the HTTP side calls, and the tokens and bytes that call it.

They keep no more rules than the routes under test can show.
"""

import asyncio
import base64
import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import Any, Literal
from uuid import UUID

import jwt
import structlog
from prometheus_client import REGISTRY

from glamd.errors import FieldError, GlamError, InputError, NotFoundError
from glamd.merchants.store import Merchant
from glamd.payments.model import Look, PaymentToken, TokenPage

CLIENT_SECRET = "client-secret-of-at-least-32-bytes!!"
INTERNAL_SECRET = "internal-secret-of-at-least-32-bytes"
MERCHANT = UUID("6f1d0a52-5b0e-4a54-9f0a-0d7c0a1f2b3c")
OTHER_MERCHANT = UUID("0e8b3f1c-7d2a-4c1b-8a39-5d6e7f809102")
NOW = datetime(2030, 1, 1, 12, 0, tzinfo=UTC)
TOKEN = "ptk_01HQ7V3K9M2N4P5R6S7T8V9W0X"
OTHER_TOKEN = "ptk_0000000000000000000000000Z"
SHORT_S = 5.0
"""How long a test waits for what must happen at once."""


class ManualClock:
    """A clock that moves when it is told to."""

    def __init__(self) -> None:
        self.wall = NOW
        self.monotonic = 1_000.0

    def now(self) -> datetime:
        """The wall time."""
        return self.wall

    def monotonic_s(self) -> float:
        """The monotonic time."""
        return self.monotonic

    def advance(self, seconds: float) -> None:
        """Move both times on."""
        self.wall += timedelta(seconds=seconds)
        self.monotonic += seconds


def payment_token(token: str = TOKEN, merchant_id: UUID = MERCHANT) -> PaymentToken:
    """A token as the payment part would give it."""
    return PaymentToken(
        token=token,
        merchant_id=merchant_id,
        device_id="dev_1",
        brand="visa",
        bin="411111",
        last4="1111",
        exp_month=12,
        exp_year=2031,
        fingerprint="f" * 64,
        entry_mode="contactless",
        status="active",
        has_sensitive_data=False,
        created_at=NOW,
        expires_at=NOW + timedelta(hours=24),
    )


def merchant(merchant_id: UUID = MERCHANT, domain: str = "shop.example") -> Merchant:
    """A merchant as its capability would give it."""
    return Merchant(
        merchant_id=merchant_id, platform="custom", shop_id="1", domain=domain, created_at=NOW
    )


class FakeTokens:
    """Tokens in a dictionary."""

    def __init__(self) -> None:
        self.tokens = {
            TOKEN: payment_token(),
            OTHER_TOKEN: payment_token(OTHER_TOKEN, OTHER_MERCHANT),
        }
        self.fails: Exception | None = None
        self.entered = asyncio.Event()
        self.gate: asyncio.Event | None = None
        self.revoked_by: list[str] = []
        self.contexts: list[dict[str, Any]] = []

    async def show(self, token: str, *, merchant_id: UUID | None) -> PaymentToken:
        """One token."""
        self.contexts.append(structlog.contextvars.get_contextvars())
        self.entered.set()
        if self.gate is not None:
            await self.gate.wait()
        if self.fails is not None:
            raise self.fails
        found = self.tokens.get(token)
        if found is None or merchant_id not in (None, found.merchant_id):
            raise NotFoundError("There is no such payment token.", code="TOKEN_NOT_FOUND")
        return found

    async def page(
        self, merchant_id: UUID, *, limit: int, page: int | None, cursor: str | None
    ) -> TokenPage:
        """Pages of one merchant; a cursor is the index to go on from."""
        if cursor is not None and not cursor.isdigit():
            raise InputError("no", fields=(FieldError("cursor", "is not one of ours"),))
        mine = [t for t in self.tokens.values() if t.merchant_id == merchant_id]
        start = int(cursor) if cursor is not None else ((page or 1) - 1) * limit
        end = start + limit
        return TokenPage(
            items=tuple(mine[start:end]),
            total=len(mine),
            next_cursor=str(end) if end < len(mine) else None,
        )

    async def revoke(
        self, token: str, *, merchant_id: UUID | None, correlation_id: str
    ) -> PaymentToken:
        """Revoke it, and remember under which correlation id."""
        found = replace(await self.show(token, merchant_id=merchant_id), status="revoked")
        self.tokens[token] = found
        self.revoked_by.append(correlation_id)
        return found


class FakeDetokenizer:
    """Answers the same card to everybody, or fails as it is told to."""

    def __init__(self) -> None:
        self.looks: list[Look] = []
        self.reports: list[Look] = []
        self.refusals: list[tuple[Look, str]] = []
        self.actions: list[str] = []
        self.fails: GlamError | None = None

    async def decrypt(self, look: Look) -> dict[str, str | None]:
        """What was asked for."""
        self.looks.append(look)
        if self.fails is not None:
            raise self.fails
        card: dict[str, str | None] = {"pan": "4111111111111111", "expiry": "3112", "emv": None}
        return {name: card.get(name) for name in look.fields}

    async def authorized(self, look: Look) -> PaymentToken:
        """A token without sensitive data."""
        self.reports.append(look)
        if self.fails is not None:
            raise self.fails
        return payment_token(look.token)

    async def refused(
        self, look: Look, code: str, *, action: Literal["decrypt", "authorized"] = "decrypt"
    ) -> None:
        """Remember the row, or have none."""
        if self.fails is not None:
            raise self.fails
        self.refusals.append((look, code))
        self.actions.append(action)


class FakeSubmissions:
    """Gives every request the same answer, or fails as it is told to."""

    def __init__(self) -> None:
        self.admitted: list[tuple[str, str]] = []
        self.submitted: list[tuple[str, bytes]] = []
        self.answer: dict[str, object] = {
            "v": 1,
            "id": "r1",
            "status": "ok",
            "token": TOKEN,
            "brand": "visa",
            "last4": "1111",
            "exp_month": 12,
            "exp_year": 2031,
            "expires_at": "2030-01-02T12:00:00Z",
            "replayed": False,
        }
        self.refuses: GlamError | None = None
        self.fails: GlamError | None = None

    async def admission(self, device_id: str, certificate_sha256: str) -> None:
        """Let it in, or not."""
        self.admitted.append((device_id, certificate_sha256))
        if self.refuses is not None:
            raise self.refuses

    async def submit(self, device_id: str, payload: bytes) -> bytes:
        """The answer."""
        self.submitted.append((device_id, payload))
        if self.fails is not None:
            raise self.fails
        return json.dumps(self.answer).encode()


def claims(**changes: object) -> dict[str, Any]:
    """Claims of a client's token that nothing is wrong with; None takes a claim away."""
    whole: dict[str, object] = {
        "merchant_id": str(MERCHANT),
        "shop": "shop.example",
        "scope": "bff:call",
        "exp": int(NOW.timestamp()) + 3600,
        "aud": "glamd",
    } | changes
    return {name: value for name, value in whole.items() if value is not None}


def client_jwt(*, secret: str = CLIENT_SECRET, **changes: object) -> str:
    """A client's token."""
    return jwt.encode(claims(**changes), secret, algorithm="HS256")


def internal_jwt(scope: str = "payment:read payment:revoke", **changes: object) -> str:
    """An internal service's token."""
    service: dict[str, object] = {"merchant_id": None, "shop": None, "service": "settler"}
    whole = claims(**(service | {"scope": scope} | changes))
    return jwt.encode(whole, INTERNAL_SECRET, algorithm="HS256")


def forged_jwt(header: Mapping[str, object], payload: bytes | Mapping[str, object]) -> str:
    """A token whose parts are what they are given as, signed with nothing."""
    body = payload if isinstance(payload, bytes) else json.dumps(payload).encode()
    parts = (json.dumps(header).encode(), body, b"not a signature")
    return ".".join(base64.urlsafe_b64encode(part).rstrip(b"=").decode() for part in parts)


@dataclass(slots=True)
class Reply:
    """An answer as it came over the wire."""

    status: int
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""

    @property
    def json(self) -> Any:
        """The body as JSON."""
        return json.loads(self.body)


class Wire:
    """A connection on which a test says every byte itself."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    async def send(self, data: bytes) -> None:
        """Write, and let it go out."""
        self.writer.write(data)
        await self.writer.drain()

    async def reply(self) -> Reply:
        """The next answer."""
        async with asyncio.timeout(SHORT_S):
            head = (await self.reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
            headers = dict(line.lower().split(": ", 1) for line in head[1:] if line)
            body = await self.reader.readexactly(int(headers.get("content-length", "0")))
        return Reply(int(head[0].split(" ")[1]), headers, body)

    async def ask(self, head: str, body: bytes = b"") -> Reply:
        """Send a request and take its answer; `head` is lines without their ends."""
        lines = [*head.split("\n"), "Host: glamd", "", ""]
        await self.send("\r\n".join(lines).encode("latin-1") + body)
        return await self.reply()

    async def closed(self) -> bool:
        """Wait until the other side has closed; what it still sent does not matter."""
        async with asyncio.timeout(SHORT_S):
            try:
                while await self.reader.read(65536):
                    pass
            except ConnectionError:
                pass
        return True

    async def silent_for(self, seconds: float) -> bool:
        """Whether nothing came, not even an end, for this long."""
        try:
            async with asyncio.timeout(seconds):
                await self.reader.read(1)
        except TimeoutError:
            return True
        return False


@asynccontextmanager
async def connected(port: int, **options: Any) -> AsyncIterator[Wire]:
    """A connection to a listener on loopback, closed at the end."""
    async with asyncio.timeout(SHORT_S):
        reader, writer = await asyncio.open_connection("127.0.0.1", port, **options)
    try:
        yield Wire(reader, writer)
    finally:
        writer.transport.abort()


def code(reply: Reply) -> tuple[int, str]:
    """Status and code of a problem."""
    assert reply.headers["content-type"] == "application/problem+json"
    return reply.status, reply.json["code"]


def counted(kind: str, outcome: str) -> float:
    """How many callers fared so."""
    labels = {"kind": kind, "outcome": outcome}
    return REGISTRY.get_sample_value("glamd_http_auth_total", labels) or 0.0
