"""The problem answers of a route: which codes it may have, by rule and by its own entry.

The rules say what `middleware`, `bodies` and `queries` can answer for a route of its kind before
and around its handler; what the handler itself may refuse stands in the route's `Operation`.
"""

from collections.abc import Sequence
from http import HTTPStatus
from typing import Final

from glamd.http.openapi_schemas import CORRELATION_ID, PROBLEM_REF, REQUEST_ID, Json, meta_example
from glamd.http.operation import Operation, Refusal
from glamd.http.problems import INTERNAL_MESSAGE, PROBLEM_TYPE
from glamd.http.routes import Route

_RETRY_AFTER: Final = {"Retry-After": {"$ref": "#/components/headers/RetryAfter"}}

GENERAL: Final = {
    refusal.code: refusal
    for refusal in (
        Refusal(code="BAD_REQUEST", status=400, when="The request is not valid HTTP."),
        Refusal(
            code="MALFORMED_JSON",
            status=400,
            when="The body is not JSON in UTF-8, has `NaN` or one name twice, or is too deep.",
        ),
        Refusal(
            code="UNAUTHENTICATED", status=401, when="No identity came, or none that is believed."
        ),
        Refusal(
            code="FORBIDDEN",
            status=403,
            when="The route is not for this kind of caller, or a scope or a grant is missing.",
        ),
        Refusal(
            code="SERVICE_NOT_ALLOWED",
            status=403,
            when="The service is not among those that the configuration names for this route.",
        ),
        Refusal(
            code="NOT_FOUND", status=404, when="There is nothing at this path for this caller."
        ),
        Refusal(
            code="METHOD_NOT_ALLOWED",
            status=405,
            when="The path takes only the methods in `Allow`.",
        ),
        Refusal(
            code="IDEMPOTENCY_IN_PROGRESS",
            status=409,
            when="The first request with this `Idempotency-Key` still runs.",
        ),
        Refusal(
            code="BODY_TOO_LARGE",
            status=413,
            when="The body is, or is announced to be, larger than 256 KiB.",
        ),
        Refusal(code="URI_TOO_LONG", status=414, when="The address is longer than 8 KiB."),
        Refusal(
            code="UNSUPPORTED_MEDIA_TYPE",
            status=415,
            when="The body is compressed, or is needed and not JSON in UTF-8.",
        ),
        Refusal(
            code="VALIDATION_ERROR",
            status=422,
            when="The request is well-formed and wrong; `errors` names the fields.",
        ),
        Refusal(
            code="IDEMPOTENCY_KEY_REUSED",
            status=422,
            when="This `Idempotency-Key` came with another body before.",
        ),
        Refusal(
            code="RATE_LIMITED",
            status=429,
            when="The caller asks too often; `Retry-After` says how many seconds to wait.",
        ),
        Refusal(
            code="HEADERS_TOO_LARGE",
            status=431,
            when="A header is longer than 8 KiB, or there are more than 64.",
        ),
        Refusal(
            code="INTERNAL_ERROR",
            status=500,
            when="The fault is on this side; the request id leads to the log.",
        ),
        Refusal(
            code="UNAVAILABLE",
            status=503,
            when="A part that is needed is away, or the daemon drains; nothing is promised about "
            "an effect, so ask again with the same key or reference after `Retry-After` seconds.",
        ),
    )
}

# What the parser of HTTP, the headers alone or the handler's deadline decide, whatever the route:
# also one that reads no body refuses a body that it would refuse to read.
_ALWAYS: Final = (
    "BAD_REQUEST",
    "BODY_TOO_LARGE",
    "HEADERS_TOO_LARGE",
    "INTERNAL_ERROR",
    "UNAVAILABLE",
    "UNSUPPORTED_MEDIA_TYPE",
    "URI_TOO_LONG",
)


def refusals(route: Route) -> list[Refusal]:
    """Every refusal that this route may answer, by status and code."""
    operation = operation_of(route)
    codes = list(_ALWAYS)
    if route.names:
        codes.append("NOT_FOUND")
    if operation.body is not None:
        codes.append("MALFORMED_JSON")
    if operation.body is not None or operation.query is not None:
        codes.append("VALIDATION_ERROR")
    if operation.idempotent:
        codes += ["IDEMPOTENCY_IN_PROGRESS", "IDEMPOTENCY_KEY_REUSED"]
    if not route.public:
        codes += ["UNAUTHENTICATED", "FORBIDDEN", "RATE_LIMITED"]
    if any(access.services is not None for access in route.access):
        codes.append("SERVICE_NOT_ALLOWED")
    # A route's own sentence about a code says more than the general one.
    found = {code: GENERAL[code] for code in codes} | {r.code: r for r in operation.refusals}
    return sorted(found.values(), key=lambda refusal: (refusal.status, refusal.code))


def operation_of(route: Route) -> Operation:
    """What the route's entry says of itself; the published document has no route without."""
    assert route.operation is not None, f"{route.method} {route.path} says nothing of itself"
    return route.operation


class ProblemAnswers:
    """Problem answers of routes; those that several routes may share are components."""

    def __init__(self) -> None:
        self.components: dict[str, Json] = {}

    def of(self, route: Route) -> Json:
        """The route's problem answers by status."""
        by_status: dict[int, list[Refusal]] = {}
        for refusal in refusals(route):
            by_status.setdefault(refusal.status, []).append(refusal)
        return {str(status): self._answer(found) for status, found in by_status.items()}

    def _answer(self, found: list[Refusal]) -> Json:
        if any(refusal is not GENERAL.get(refusal.code) for refusal in found):
            return _answer(found)
        name = "Or".join(_camel(refusal.code) for refusal in found)
        self.components[name] = _answer(found)
        return {"$ref": f"#/components/responses/{name}"}


def _answer(found: list[Refusal]) -> Json:
    status = found[0].status
    headers: Json = {**REQUEST_ID, **CORRELATION_ID}
    if status in (429, 503):
        headers |= _RETRY_AFTER
    if status == HTTPStatus.UNAUTHORIZED:
        headers["WWW-Authenticate"] = {"$ref": "#/components/headers/WwwAuthenticate"}
    return {
        "description": _told(found),
        "headers": headers,
        "content": {
            PROBLEM_TYPE: {
                "schema": {
                    "allOf": [
                        PROBLEM_REF,
                        {
                            "properties": {
                                "status": {"const": status},
                                "code": {"enum": [refusal.code for refusal in found]},
                            }
                        },
                    ]
                },
                "examples": {refusal.code: {"value": example(refusal)} for refusal in found},
            }
        },
    }


def _told(found: Sequence[Refusal]) -> str:
    lines = [f"`{refusal.code}`: {refusal.when}" for refusal in found]
    return lines[0] if len(lines) == 1 else "\n".join(f"- {line}" for line in lines)


def example(refusal: Refusal) -> Json:
    """What the problem answer may look like."""
    detail = refusal.when.replace("`", "")
    if refusal.code == "INTERNAL_ERROR":
        detail = INTERNAL_MESSAGE
    errors = []
    if refusal.code == "VALIDATION_ERROR":
        errors = [{"field": "limit", "message": "Input should be greater than or equal to 1"}]
    body: Json = {
        "type": "about:blank",
        "title": HTTPStatus(refusal.status).phrase,
        "status": refusal.status,
        "detail": detail,
        "code": refusal.code,
    }
    if errors:
        body["errors"] = errors
    members = {"balance": 2, "required": 3} if refusal.code == "INSUFFICIENT_CREDITS" else {}
    body |= members
    body["error"] = {"code": refusal.code, "message": detail, "details": errors, **members}
    body["meta"] = meta_example()
    return body


def _camel(code: str) -> str:
    return "".join(word.capitalize() for word in code.split("_"))
