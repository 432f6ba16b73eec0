"""What `bench.http` holds us against: FastAPI on uvicorn doing the work of our pipeline.

As its users write it: a dependency verifies the JWT with PyJWT, a response model validates, an ASGI
middleware gives out ids, counts for Prometheus and logs a line through structlog. It has no rate
limit, no access rules beyond the scope, and no security headers.
"""

import socket
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any
from uuid import UUID, uuid4

import jwt
import orjson
import prometheus_client
import structlog
import uvicorn
from fastapi import Depends, FastAPI, Header, HTTPException
from pydantic import BaseModel

from bench.http_servers import DATA, PATH, SECRET, announce, nowhere

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]


class Bearer(BaseModel):
    """Who asks."""

    merchant_id: UUID
    scopes: frozenset[str]


class Meta(BaseModel):
    """The ids of an answer."""

    request_id: str
    correlation_id: str


class Credit(BaseModel):
    """The data of the answer."""

    balance: int
    total_granted: int
    total_consumed: int
    platform_name: str
    shop_domain: str


class Envelope(BaseModel):
    """The answer."""

    data: Credit
    meta: Meta


class Observed:
    """Middleware without Starlette's base class, which would be slower: ids, metrics, a line."""

    def __init__(self, app: App) -> None:
        self._app = app
        self._log = structlog.get_logger()
        self._requests = prometheus_client.Counter(
            "requests_total", "Requests.", ["method", "path", "status"]
        )
        self._duration = prometheus_client.Histogram("duration_seconds", "Time.", ["path"])

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began_s = time.perf_counter()
        given = dict(scope["headers"]).get(b"x-request-id")
        request_id = given.decode("latin-1") if given else uuid4().hex
        scope["state"]["request_id"] = request_id
        structlog.contextvars.clear_contextvars()
        structlog.contextvars.bind_contextvars(request_id=request_id, correlation_id=request_id)
        status = 500

        async def observing(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"].append((b"x-request-id", request_id.encode()))
            await send(message)

        try:
            await self._app(scope, receive, observing)
        finally:
            took_s = time.perf_counter() - began_s
            self._requests.labels(scope["method"], scope["path"], str(status)).inc()
            self._duration.labels(scope["path"]).observe(took_s)
            self._log.info(
                "http_request",
                method=scope["method"],
                path=scope["path"],
                status=status,
                duration_ms=round(took_s * 1000, 2),
                ip=scope["client"][0],
            )


def serve(*, cached: bool) -> None:
    """Serve until the process is ended; `cached` believes a verified token without verifying."""
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.JSONRenderer(lambda event, **_: orjson.dumps(event).decode()),
        ],
        logger_factory=structlog.WriteLoggerFactory(nowhere()),
        cache_logger_on_first_use=True,
    )
    app = FastAPI()
    app.add_middleware(Observed)
    known: dict[str, tuple[Bearer, float]] = {}

    def verified(token: str) -> Bearer:
        try:
            claims = jwt.decode(token, SECRET, algorithms=["HS256"], audience="glamd")
        except jwt.PyJWTError:
            raise HTTPException(status_code=401, detail="Not authenticated") from None
        bearer = Bearer(
            merchant_id=claims["merchant_id"], scopes=frozenset(claims["scope"].split())
        )
        if cached:
            known[token] = bearer, claims["exp"]
        return bearer

    async def who(authorization: str = Header()) -> Bearer:
        token = authorization.removeprefix("Bearer ")
        found = known.get(token)
        bearer = found[0] if found and found[1] > time.time() else verified(token)
        if "bff:call" not in bearer.scopes:
            raise HTTPException(status_code=403, detail="Forbidden")
        return bearer

    async def credit(bearer: Bearer = Depends(who)) -> Envelope:  # noqa: B008 - FastAPI's way
        assert bearer.merchant_id
        ids = str(structlog.contextvars.get_contextvars()["request_id"])
        return Envelope(
            data=Credit.model_validate(DATA), meta=Meta(request_id=ids, correlation_id=ids)
        )

    app.add_api_route(PATH, credit, methods=["GET"], response_model=Envelope)
    listening = socket.create_server(("127.0.0.1", 0), backlog=512)
    announce(listening.getsockname()[1])
    config = uvicorn.Config(app, loop="uvloop", http="httptools", access_log=False, lifespan="off")
    uvicorn.Server(config).run(sockets=[listening])
