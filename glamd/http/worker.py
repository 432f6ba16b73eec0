"""The workers' listener: mutual TLS, and `decrypt`, the one route that answers with card data.

A worker is who the URI in its client certificate says; the certificate itself was checked by TLS
against the workers' CA before a byte of HTTP was read. What a worker may see is the detokenizer's
decision, which also writes the audit row; nothing here knows grants, and nothing logs an answer.
A worker's request that is refused before it gets there is an attempt as well, and has its row.
"""

import hashlib
import re
import ssl
from collections.abc import Callable
from typing import Annotated, Final

import orjson
from aiohttp import web
from pydantic import Field, field_validator
from typing_extensions import TypedDict

from glamd.clock import Clock
from glamd.errors import ConfigError, ForbiddenError, GlamError, UnauthenticatedError
from glamd.http.addresses import ClientAddress
from glamd.http.bodies import Body, ClientGoneError, SlowBodyError, parse_json, read_body
from glamd.http.call import Answer, Call
from glamd.http.connections import GuardedHandler
from glamd.http.health import Health, health_routes
from glamd.http.identity import Identity, Worker
from glamd.http.limits import HttpLimits, RateLimiter
from glamd.http.listener import Listener
from glamd.http.middleware import Pipeline
from glamd.http.operation import Operation, Refusal
from glamd.http.payment_tokens import TOKEN_NOT_FOUND, TOKEN_PARAM, is_token
from glamd.http.routes import WORKER, Route, RouteTable
from glamd.http.services import Detokenizer
from glamd.payments.model import DECRYPT_FIELDS, DecryptField, Look

STOP_TIMEOUT_S = 10.0

DECRYPT_PATH = "/internal/v1/payment-tokens/{token}/decrypt"

UNREADABLE = "-"
"""Stands in an audit row for what was given and does not have its form: never the thing itself."""

FIELDS_RECORDED = 16
"""Field names of a refused body that go into its audit row."""

_PURPOSE = r"^[A-Za-z0-9._-]{1,64}$"


class DecryptBody(Body):
    """What a worker wants to see, and why."""

    purpose: Annotated[str, Field(pattern=_PURPOSE)]
    fields: Annotated[
        list[DecryptField],
        Field(
            min_length=1,
            max_length=len(DECRYPT_FIELDS),
            json_schema_extra={"uniqueItems": True},
        ),
    ]

    @field_validator("fields")
    @classmethod
    def _each_once(cls, fields: list[DecryptField]) -> list[DecryptField]:
        if len(set(fields)) != len(fields):
            raise ValueError("a field stands twice")
        return fields


class OpenedCard(TypedDict, total=False):
    """The fields that were asked for; `expiry` is `YYMM`, `emv` hex, null what was not there."""

    pan: str | None
    expiry: str | None
    cardholder_name: str | None
    service_code: str | None
    track2: str | None
    emv: str | None


_DECRYPT: Final = Operation(
    id="decryptPaymentToken",
    tag="Detokenizing",
    summary="See card data of a payment token",
    description="The look is an audit row, committed before it is answered, as every refusal is.",
    params={"token": TOKEN_PARAM},
    body=DecryptBody,
    body_example={"purpose": "settlement", "fields": ["expiry", "emv"]},
    answer=OpenedCard,
    example={"expiry": "4912", "emv": None},
    refusals=(
        TOKEN_NOT_FOUND,
        Refusal(code="TOKEN_EXPIRED", status=410, when="The token has expired."),
        Refusal(code="TOKEN_REVOKED", status=410, when="The token was revoked."),
        Refusal(
            code="FORBIDDEN",
            status=403,
            when="The purpose, a field or the token's merchant is outside the worker's grant.",
        ),
    ),
)


class WorkerIdentity:
    """Recognises a worker by the URI SAN `spiffe://<trust-domain>/worker/<name>`."""

    def __init__(self, trust_domain: str) -> None:
        domain = re.escape(trust_domain)
        self._worker = re.compile(rf"spiffe://{domain}/worker/([A-Za-z0-9][A-Za-z0-9._-]{{0,63}})")
        self._ours = f"spiffe://{trust_domain}/"

    async def __call__(self, request: web.BaseRequest) -> Identity:
        """The worker.

        Raises `UnauthenticatedError` where the certificate names nobody of our trust domain,
        `ForbiddenError` where it names somebody who is no worker.
        """
        handler = request.protocol
        assert isinstance(handler, GuardedHandler)
        if handler.identity is None:
            # A certificate holds for as long as its connection.
            handler.identity = self._recognise(request.transport)
        return handler.identity

    def _recognise(self, transport: object) -> Identity:
        tls = _tls_of(transport)
        uris = [
            value
            for name in (tls.getpeercert() or {}).get("subjectAltName", ())
            if isinstance(name, tuple) and name[0] == "URI" and isinstance(value := name[1], str)
        ]
        if len(uris) != 1:
            raise UnauthenticatedError("The client certificate needs exactly one URI name.")
        worker = self._worker.fullmatch(uris[0])
        if worker is None:
            if uris[0].startswith(self._ours):
                raise ForbiddenError("The client certificate is no worker's.")
            raise UnauthenticatedError("The client certificate is of another trust domain.")
        der = tls.getpeercert(binary_form=True)
        assert der is not None
        return Worker(name=worker[1], certificate_sha256=hashlib.sha256(der).hexdigest())


class DecryptRoutes:
    """The handler of `decrypt`."""

    def __init__(self, detokenizer: Detokenizer) -> None:
        self._detokenizer = detokenizer

    def routes(self) -> tuple[Route, ...]:
        """The table's entries."""
        return (
            Route(
                method="POST",
                path=DECRYPT_PATH,
                handler=self._decrypt,
                access=(WORKER,),
                operation=_DECRYPT,
            ),
        )

    async def refused(self, call: Call, error: GlamError) -> None:
        """Audit a worker's request that never came to the handler; raises `UnavailableError`."""
        if call.route == DECRYPT_PATH:
            await self._detokenizer.refused(_look(call, purpose="", fields=()), error.code)

    async def _decrypt(self, call: Call) -> Answer:
        raw = b""
        try:
            raw = await read_body(call.request, call.limits)
            body = parse_json(call.request, raw, DecryptBody)
        except Exception as error:
            # Whatever it was, a worker asked for a card and it ended here.
            code = _code(error)
            purpose, fields = _legible(raw) if code == "VALIDATION_ERROR" else ("", ())
            await self._detokenizer.refused(_look(call, purpose=purpose, fields=fields), code)
            raise
        # Also for a path that no token can have: the grant is judged first, and there is a row.
        look = _look(call, purpose=body.purpose, fields=tuple(body.fields))
        clear = await self._detokenizer.decrypt(look)
        data: OpenedCard = {}
        for name in body.fields:
            data[name] = clear.get(name)
        return Answer(data=data)


def _look(call: Call, *, purpose: str, fields: tuple[str, ...]) -> Look:
    token = call.params["token"]
    return Look(
        worker=call.worker.name,
        certificate_sha256=call.worker.certificate_sha256,
        ip=call.ip,
        token=token if is_token(token) else UNREADABLE,
        fields=fields,
        purpose=purpose,
        correlation_id=call.correlation_id,
    )


def _code(error: Exception) -> str:
    """What an audit row calls this error; the first two are never answered."""
    if isinstance(error, SlowBodyError):
        return "SLOW_BODY"
    if isinstance(error, ClientGoneError):
        return "CLIENT_GONE"
    return error.code if isinstance(error, GlamError) else "INTERNAL_ERROR"


def _legible(raw: bytes) -> tuple[str, tuple[str, ...]]:
    """What has the right form of purpose and fields in a body that is JSON and no `DecryptBody`."""
    body: object = orjson.loads(raw)
    given: dict[str, object] = body if isinstance(body, dict) else {}
    purpose, fields = given.get("purpose", ""), given.get("fields", [])
    known = isinstance(purpose, str) and re.fullmatch(rf"|{_PURPOSE}", purpose)
    if not isinstance(fields, list):
        fields = [None]
    return (
        str(purpose) if known else UNREADABLE,
        tuple(
            str(name) if name in DECRYPT_FIELDS else UNREADABLE for name in fields[:FIELDS_RECORDED]
        ),
    )


class WorkerServer:
    """The workers' listener, whole."""

    def __init__(
        self,
        *,
        detokenizer: Detokenizer,
        trust_domain: str,
        health: Health,
        limiter: RateLimiter,
        draining: Callable[[], bool],
        clock: Clock,
        limits: HttpLimits | None = None,
    ) -> None:
        limits = limits or HttpLimits()
        decrypt = DecryptRoutes(detokenizer)
        routes = (*decrypt.routes(), *health_routes(health))
        pipeline = Pipeline(
            listener="worker",
            table=RouteTable(routes),
            authenticate=WorkerIdentity(trust_domain),
            # Workers come with their own certificate, so nobody stands in between.
            address=ClientAddress(),
            limits=limits,
            limiter=limiter,
            draining=draining,
            clock=clock,
            refused=decrypt.refused,
        )
        self._listener = Listener(pipeline, name="worker", limits=limits, refuse=pipeline.refuse)

    async def start(self, host: str, port: int, context: ssl.SSLContext) -> int:
        """Listen (port 0: any free one) and return the port.

        Raises `ConfigError` where the address cannot be bound, or the context would let in a
        client without a certificate.
        """
        _demand_certificates(context)
        return await self._listener.start_tcp(host, port, context)

    async def replace_tls(self, context: ssl.SSLContext) -> None:
        """Handshakes from now on use `context`; raises `ConfigError` as `start` does."""
        _demand_certificates(context)
        await self._listener.replace_tls(context)

    async def stop(self, timeout_s: float = STOP_TIMEOUT_S) -> None:
        """Stop listening, let requests under way end, close the connections."""
        await self._listener.stop(timeout_s)


def _demand_certificates(context: ssl.SSLContext) -> None:
    if context.verify_mode is not ssl.CERT_REQUIRED:
        raise ConfigError("The workers' listener must require client certificates.")


def _tls_of(transport: object) -> ssl.SSLObject:
    getter = getattr(transport, "get_extra_info", None)
    tls = getter("ssl_object") if getter is not None else None
    if tls is None:
        raise UnauthenticatedError("The connection is not, or no longer, one of TLS.")
    found: ssl.SSLObject = tls
    return found
