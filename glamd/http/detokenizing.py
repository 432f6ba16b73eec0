"""`decrypt`, the one route that answers with card data, and `authorized`, which ends its most
sensitive part. Both are workers' alone.

What a worker may see is the detokenizer's decision, which also writes the audit row; nothing here
knows grants, and nothing logs an answer. A request that is refused before it gets there is an
attempt as well, whoever made it, and has its row.
"""

import hashlib
import re
from typing import Annotated, Final, Literal

import orjson
from pydantic import Field, field_validator
from typing_extensions import TypedDict

from glamd.errors import GlamError
from glamd.http.bodies import Body, ClientGoneError, SlowBodyError, parse_json, read_body
from glamd.http.call import Answer, Call
from glamd.http.certificates import presented
from glamd.http.identity import Device, Worker
from glamd.http.operation import Operation, Refusal
from glamd.http.payment_tokens import TOKEN_NOT_FOUND, TOKEN_PARAM, is_token
from glamd.http.routes import WORKER, Route
from glamd.http.services import Detokenizer, LookAction
from glamd.payments.model import DECRYPT_FIELDS, DecryptField, Look, TokenStatus

DECRYPT_PATH = "/internal/v1/payment-tokens/{token}/decrypt"
AUTHORIZED_PATH = "/internal/v1/payment-tokens/{token}/authorized"

UNREADABLE = "-"
"""Stands in an audit row for what was given and does not have its form: never the thing itself."""

FIELDS_RECORDED = 16
"""Field names of a refused body that go into its audit row."""

_ACTIONS: Final[dict[str, LookAction]] = {DECRYPT_PATH: "decrypt", AUTHORIZED_PATH: "authorized"}
"""What a request on these paths wanted, as its audit row calls it."""

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


class AuthorizedBody(Body):
    """Nothing: the path says it all. An empty object is taken, as some clients cannot send less."""


class OpenedCard(TypedDict, total=False):
    """The fields that were asked for; `expiry` is `YYMM`, `emv` hex, null what was not there."""

    pan: str | None
    expiry: str | None
    cardholder_name: str | None
    service_code: str | None
    track2: str | None
    emv: str | None


class AuthorizedToken(TypedDict):
    """A token that has no sensitive authentication data any more."""

    token: str
    status: TokenStatus
    has_sensitive_data: Literal[False]


_GONE: Final = (
    TOKEN_NOT_FOUND,
    Refusal(code="TOKEN_EXPIRED", status=410, when="The token has expired."),
    Refusal(code="TOKEN_REVOKED", status=410, when="The token was revoked."),
)
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
        *_GONE,
        Refusal(
            code="FORBIDDEN",
            status=403,
            when="The purpose, a field or the token's merchant is outside the worker's grant.",
        ),
    ),
)
_AUTHORIZED: Final = Operation(
    id="reportAuthorized",
    tag="Detokenizing",
    summary="Say that the payment is authorized",
    description="Sensitive authentication data (track 2, EMV) is erased now; PAN and expiry stay "
    "until the token expires. Saying it again is the same. There is no body. Each report is an "
    "audit row, committed before it is answered, as every refusal is.",
    params={"token": TOKEN_PARAM},
    answer=AuthorizedToken,
    example={
        "token": TOKEN_PARAM.example,
        "status": "active",
        "has_sensitive_data": False,
    },
    refusals=(
        *_GONE,
        Refusal(
            code="FORBIDDEN",
            status=403,
            when="The worker has no grant, or none for the token's merchant.",
        ),
    ),
)


class DetokenizeRoutes:
    """The handlers of `decrypt` and `authorized`."""

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
            Route(
                method="POST",
                path=AUTHORIZED_PATH,
                handler=self._authorized,
                access=(WORKER,),
                operation=_AUTHORIZED,
            ),
        )

    async def refused(self, call: Call, error: GlamError) -> None:
        """Audit a request that never came to its handler; raises `UnavailableError`."""
        action = _ACTIONS.get(call.route)
        if action is not None:
            await self._detokenizer.refused(_look(call), error.code, action=action)

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

    async def _authorized(self, call: Call) -> Answer:
        look = _look(call)
        try:
            raw = await read_body(call.request, call.limits)
            if raw:
                parse_json(call.request, raw, AuthorizedBody)
        except Exception as error:
            await self._detokenizer.refused(look, _code(error), action="authorized")
            raise
        token = await self._detokenizer.authorized(look)
        data: AuthorizedToken = {
            "token": token.token,
            "status": token.status,
            "has_sensitive_data": False,
        }
        return Answer(data=data)


def _look(call: Call, *, purpose: str = "", fields: tuple[str, ...] = ()) -> Look:
    token = call.params["token"]
    actor, fingerprint = _who(call)
    return Look(
        worker=actor,
        certificate_sha256=fingerprint,
        ip=call.ip,
        token=token if is_token(token) else UNREADABLE,
        fields=fields,
        purpose=purpose,
        correlation_id=call.correlation_id,
    )


def _who(call: Call) -> tuple[str, str]:
    """The actor of an audit row and the certificate it showed; a colon is in no worker's name."""
    identity = call.identity
    if isinstance(identity, Worker):
        return identity.name, identity.certificate_sha256
    if isinstance(identity, Device):
        return f"device:{identity.name}", identity.certificate_sha256
    shown = presented(call.request)
    return UNREADABLE, "" if shown is None else hashlib.sha256(shown).hexdigest()


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
