"""`POST /api/v1/payment-tokens`: a device's tokenize request over HTTP, by itself or by a service.

The request is judged, ordered and remembered by the device's session, as if it had come over MQTT;
here its answer gets a status. What came in is passed on as it is and never logged. The route stands
on both listeners: on the workers' for devices, on the api listener for internal services.
"""

from collections.abc import Mapping
from datetime import datetime
from typing import Annotated, Any, Final, Literal, cast

import orjson
from pydantic import AwareDatetime, ConfigDict, Field
from pydantic.json_schema import SkipJsonSchema
from typing_extensions import TypedDict

from glamd.errors import (
    ConflictError,
    FieldError,
    ForbiddenError,
    GlamError,
    InputError,
    RateLimitedError,
    UnavailableError,
)
from glamd.http.bodies import WRONG_BODY, Body, parse_any, read_body
from glamd.http.call import Answer, Call
from glamd.http.certificates import DEVICE_ID
from glamd.http.idempotent import REPLAYED
from glamd.http.identity import Device
from glamd.http.operation import Operation, Refusal
from glamd.http.problems import RepeatedError, status_of
from glamd.http.routes import DEVICE, Route, internal
from glamd.http.services import Submissions
from glamd.payments.model import EntryMode, Format, Scheme

PATH: Final = "/api/v1/payment-tokens"

KINDS: Final[Mapping[str, type[GlamError]]] = {
    "MALFORMED": InputError,
    "UNSUPPORTED": InputError,
    "DEVICE_UNKNOWN": ForbiddenError,
    "DEVICE_SUSPENDED": ForbiddenError,
    "DEVICE_REVOKED": ForbiddenError,
    "DEVICE_CERTIFICATE_REPLACED": ForbiddenError,
    "DEVICE_CERTIFICATE_EXPIRED": ForbiddenError,
    "KEY_SET_UNKNOWN": InputError,
    "KSN_MISMATCH": InputError,
    "KSN_INVALID": InputError,
    "KSN_REPLAYED": ConflictError,
    "KSN_TOO_OLD": ConflictError,
    "MAC_INVALID": InputError,
    "DECRYPT_FAILED": InputError,
    "REQUEST_ID_REUSED": ConflictError,
    "RATE_LIMITED": RateLimitedError,
    "UNAVAILABLE": UnavailableError,
    "INTERNAL": UnavailableError,
}
"""What kind of error each code of the MQTT contract is here, and so its status."""

_FIELDS: Final[Mapping[str, str]] = {
    "KSN_MISMATCH": "ksn",
    "KSN_INVALID": "ksn",
    "KSN_REPLAYED": "ksn",
    "KSN_TOO_OLD": "ksn",
    "MAC_INVALID": "mac",
    "DECRYPT_FAILED": "data",
    "REQUEST_ID_REUSED": "id",
}
"""The field that a code is about."""


_DEVICE_ID = rf"^{DEVICE_ID.pattern}$"
_KSN = r"^([0-9A-Fa-f]{20}|[0-9A-Fa-f]{24})$"
_MAC = r"^([0-9A-Fa-f]{8}|[0-9A-Fa-f]{16}|[0-9A-Fa-f]{32})$"
_BASE64 = r"^([A-Za-z0-9+/]{4})+([A-Za-z0-9+/]{2}==|[A-Za-z0-9+/]{3}=)?$"


class SubmissionAmount(Body):
    """An amount in minor units of its currency."""

    value: Annotated[int, Field(ge=0, le=2**53 - 1)]
    currency: Annotated[str, Field(pattern=r"^[A-Z]{3}$")]


def _no_default(schema: dict[str, Any]) -> None:
    # What is not there is not null either.
    schema.pop("default")


class SubmissionBody(Body):
    """A tokenize request of the MQTT contract; fields that are not known are passed over."""

    # It is here to be read: the judge of a request is the device's session.

    model_config = ConfigDict(extra="ignore")

    v: Literal[1]
    id: Annotated[
        str,
        Field(
            min_length=1,
            max_length=64,
            description="Unique for the device: within 24 h the same `id` with the same content "
            "gets the first answer again, whether it came over HTTP or MQTT.",
        ),
    ]
    type: Literal["tokenize"]
    ksn: Annotated[str, Field(pattern=_KSN, description="10 bytes (TDES) or 12 (AES).")]
    data: Annotated[str, Field(pattern=_BASE64, description="The ciphertext: whole blocks.")]
    scheme: Scheme
    format: Format
    entry_mode: EntryMode
    mac: Annotated[str, Field(pattern=_MAC)] | SkipJsonSchema[None] = Field(
        default=None, json_schema_extra=_no_default
    )
    amount: SubmissionAmount | SkipJsonSchema[None] = Field(
        default=None, json_schema_extra=_no_default
    )
    at: AwareDatetime | SkipJsonSchema[None] = Field(default=None, json_schema_extra=_no_default)
    device_id: Annotated[str, Field(pattern=_DEVICE_ID)] | SkipJsonSchema[None] = Field(
        default=None,
        json_schema_extra=_no_default,
        description="Whose request it is. An internal service must say it; a device is known by "
        "its certificate, and may only name itself.",
    )


class SubmittedToken(TypedDict):
    """The answer of the MQTT contract."""

    v: Literal[1]
    id: str
    status: Literal["ok"]
    token: str
    brand: str
    last4: str
    exp_month: int | None
    exp_year: int | None
    expires_at: datetime
    replayed: bool


_WHEN: Final[Mapping[str, str]] = {
    "MALFORMED": "The request is not one of the MQTT contract; `errors` names the field.",
    "UNSUPPORTED": "Another version, type, scheme or format; only `tokenize` is taken here.",
    "DEVICE_UNKNOWN": "The device is not enrolled.",
    "DEVICE_SUSPENDED": "The device is suspended.",
    "DEVICE_REVOKED": "The device is revoked for good.",
    "DEVICE_CERTIFICATE_REPLACED": "The device has been given another certificate since.",
    "DEVICE_CERTIFICATE_EXPIRED": "The device's certificate has expired.",
    "KEY_SET_UNKNOWN": "The device's key set is retired.",
    "KSN_MISMATCH": "The KSN is not this device's.",
    "KSN_INVALID": "A device never uses this transaction counter.",
    "KSN_REPLAYED": "The transaction counter was used before, under another `id`.",
    "KSN_TOO_OLD": "The transaction counter is behind the window.",
    "MAC_INVALID": "The MAC is wrong, or is missing and required.",
    "DECRYPT_FAILED": "There is no card in the ciphertext. The `id` and the counter are used up.",
    "REQUEST_ID_REUSED": "The `id` came with other content before.",
    "RATE_LIMITED": "The device or the caller asks too often.",
    "UNAVAILABLE": "Not now; send the same request again.",
    "INTERNAL": "The fault is on this side; send the same request again.",
}
_SUBMIT: Final = Operation(
    id="submitTokenizeRequest",
    tag="Payment tokens",
    summary="Turn a card that a device has encrypted into a payment token",
    description="One `tokenize` request of the MQTT contract, with its answer as `data` and its "
    "error codes as `code`; at most 16 KiB. Devices come to the workers' listener, internal "
    "services to the api listener. The `id` is the idempotency key: a header for that is not "
    "looked at. A repeated request is answered as the first one was, with 201 and `replayed`.",
    body=SubmissionBody,
    body_example={
        "v": 1,
        "id": "7f3a9c",
        "type": "tokenize",
        "ksn": "123456789C31D3CC00000001",
        "data": "mB5kQ2n1x7hVt0cYw9uJ3fZ8sLr4aEoD6gPqTzXiKbNyWvUcRjHlMAeFSO0dGt2I",
        "scheme": "aes-dukpt",
        "format": "track2",
        "entry_mode": "magstripe",
        "device_id": "dev_9c31d3ccd4c5e502eed1",
    },
    answer=SubmittedToken,
    example={
        "v": 1,
        "id": "7f3a9c",
        "status": "ok",
        "token": "ptk_9AV8E50SQGM3VQF3MMC59HQTMB",
        "brand": "mastercard",
        "last4": "4444",
        "exp_month": 12,
        "exp_year": 2049,
        "expires_at": "2026-11-22T12:28:47.818622Z",
        "replayed": False,
    },
    status=201,
    refusals=tuple(
        Refusal(code=code, status=status_of(kind("")), when=_WHEN[code])
        for code, kind in KINDS.items()
    ),
)


class SubmissionRoutes:
    """The handler of submissions, on either listener."""

    def __init__(self, submissions: Submissions) -> None:
        self._submissions = submissions

    def routes(self) -> tuple[Route, ...]:
        """The table's entry; a listener has only one of the two kinds of callers."""
        return (
            Route(
                method="POST",
                path=PATH,
                handler=self._submit,
                access=(internal("payment:tokenize"), DEVICE),
                operation=_SUBMIT,
            ),
        )

    async def _submit(self, call: Call) -> Answer:
        identity = call.identity
        if isinstance(identity, Device):
            # At each request: a connection may outlive what its certificate is good for.
            await self._submissions.admission(identity.name, identity.certificate_sha256)
        raw = await read_body(call.request, call.limits)
        device_id = _device(call, parse_any(call.request, raw))
        return _answer(await self._submissions.submit(device_id, raw))


def _device(call: Call, body: object) -> str:
    """Whose request it is: a device's own, or that of the device which a service names."""
    if not isinstance(body, dict):
        raise InputError("the message is not a JSON object", code="MALFORMED")
    named: object = body.get("device_id")
    if isinstance(call.identity, Device):
        if "device_id" in body and named != call.identity.name:
            raise ForbiddenError("A device submits for itself alone.")
        return call.identity.name
    if not isinstance(named, str) or not DEVICE_ID.fullmatch(named):
        why = "It should be a device id." if "device_id" in body else "This field is needed."
        raise InputError(WRONG_BODY, fields=[FieldError("device_id", why)])
    return named


def _answer(answer: bytes) -> Answer:
    """The session's answer as one of HTTP; raises the error that it is."""
    told = cast("dict[str, object]", orjson.loads(answer))
    replayed = bool(told.get("replayed", False))
    if told["status"] == "ok":
        return Answer(data=told, status=201, headers=REPLAYED if replayed else {})
    code, message = str(told["code"]), str(told["message"])
    fields = [FieldError(_FIELDS[code], message)] if code in _FIELDS else []
    error = KINDS[code](message, code=code, fields=fields)
    if replayed:
        raise RepeatedError(
            message, code=code, fields=fields, status=status_of(error), headers=REPLAYED
        )
    raise error
