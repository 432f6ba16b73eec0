"""The published document: OpenAPI 3.1, made from the route tables of both listeners.

A thin layer over pydantic: what a request must be comes from the models that validate it, what an
answer is from the TypedDicts that handlers return, who may call from the `access` that the pipeline
checks. `make docs` writes the copy that is checked in; a test holds it to the code. Nothing of a
daemon's settings is in it, so it is the same everywhere.
"""

import json
import sys
from collections.abc import Iterable, Sequence
from http import HTTPStatus
from typing import Final, cast

from glamd import __version__
from glamd.billing.service import Billing
from glamd.billing.webhooks.service import Webhooks
from glamd.clock import Clock
from glamd.http.billing import BillingRoutes
from glamd.http.credits import CreditRoutes
from glamd.http.detokenizing import DetokenizeRoutes
from glamd.http.docs_page import docs_routes
from glamd.http.health import Health, health_routes
from glamd.http.idempotent import Once
from glamd.http.openapi_refusals import ProblemAnswers, operation_of
from glamd.http.openapi_schemas import (
    CORRELATION_ID,
    REQUEST_ID,
    Json,
    Mode,
    Schemas,
    enveloped,
    enveloped_example,
    without_null,
)
from glamd.http.operation import JSON, Operation, Param
from glamd.http.payment_tokens import PaymentTokenRoutes
from glamd.http.platform_tokens import PlatformTokenRoutes
from glamd.http.routes import DEVICE, Access, Route
from glamd.http.services import Detokenizer, PlatformVault, Submissions, Tokens
from glamd.http.submissions import SubmissionRoutes
from glamd.http.webhooks import WebhookRoutes
from glamd.ledger.service import Ledger

_ABOUT: Final = """\
Payment tokens, credits, billing and platform tokens, over two listeners. The **api listener** is
for storefront back ends (clients) and internal services, who bring a JWT; the **workers' listener**
is for authorized workers and for devices, who bring a certificate. Who may call a route is said at
each.

**Answers.** A success is `{"data": …, "meta": …}`, a list has `pagination` too. An error is
`application/problem+json` (RFC 9457) with a stable `code`, and the same again under `error` for
older clients. A path that takes other methods answers 405 `METHOD_NOT_ALLOWED` with `Allow`.
`HEAD` is answered wherever `GET` is.

**Ids.** `X-Request-ID` and `X-Correlation-ID` come back on every answer, as they came where they
are 1 to 128 letters, digits and `. _ : / + = -`; else they are made here.

**Lists.** `?page=` and `?limit=`, or `?cursor=` with the `next_cursor` of the page before, by which
a deep page costs what the first one costs.

**Limits.** A body is JSON in UTF-8, at most 256 KiB, not compressed, with no field that is unknown.
A connection that sends slowly is closed within 10 s. Unknown parameters of a query are ignored.
"""

TAGS: Final = {
    "Payment tokens": "Metadata of tokens that stand for cards. No card number ever passes here.",
    "Platform tokens": "The credentials of a merchant's shop platform.",
    "Credits": "What a merchant may use, and each time that this changed.",
    "Billing": "Trials, and packs of credits that a merchant buys.",
    "Webhooks": "What platforms tell of charges; they are believed by their signatures.",
    "Detokenizing": "For workers with a grant, over mutual TLS. Each look is audited first.",
    "Health": "For probes and monitoring, on every listener; nobody is asked who they are.",
    "Documentation": "This document, for programs and for people.",
}

_SECURITY: Final[Json] = {
    "clientToken": {
        "type": "http",
        "scheme": "bearer",
        "bearerFormat": "JWT",
        "description": "A storefront back end, for its own merchant: HS256, or ES256, EdDSA or "
        "RS256 with a key of the clients' JWKS. Claims: `exp` (at most 24 h away), `aud` `glamd`, "
        "`merchant_id` or `shop`, `scope`.",
    },
    "internalToken": {
        "type": "http",
        "scheme": "bearer",
        "bearerFormat": "JWT",
        "description": "A service of the same house: signed as a client's, with the internal "
        "secret or a key of the internal JWKS. Claims: `exp`, `aud`, `service`, `scope`.",
    },
    "workerCertificate": {
        "type": "mutualTLS",
        "description": "A client certificate of the workers' CA with exactly one URI name, "
        "`spiffe://<trust-domain>/worker/<name>`.",
    },
    "deviceCertificate": {
        "type": "mutualTLS",
        "description": "The client certificate that the device was given last; its CN is the "
        "device's id.",
    },
}
_SCHEME: Final = {
    "client": "clientToken",
    "internal": "internalToken",
    "worker": "workerCertificate",
    "device": "deviceCertificate",
}
_CALLER: Final = {
    "client": "a client",
    "internal": "an internal service",
    "worker": "a worker",
    "device": "a device",
}
_OWNED: Final = {
    "own": "for its own merchant",
    "any": "for any merchant",
    "grant": "within its grant",
    "nobody's": "",
}
_API_SERVER: Final[Json] = {"url": "/", "description": "The api listener."}
_WORKERS_SERVER: Final[Json] = {
    "url": "https://{workers_listener}",
    "description": "The workers' listener: mutual TLS, on a port of its own.",
    "variables": {
        "workers_listener": {
            "default": "localhost:8443",
            "description": "Host and port of the workers' listener.",
        }
    },
}

_ID_SCHEMA: Final[Json] = {"type": "string", "pattern": "^[A-Za-z0-9._:/+=-]{1,128}$"}
_HEADERS: Final[Json] = {
    "RequestId": {
        "description": "The request's id: as it came, or made here.",
        "required": True,
        "schema": _ID_SCHEMA,
    },
    "CorrelationId": {
        "description": "The id that joins requests in logs, audit rows and events.",
        "required": True,
        "schema": _ID_SCHEMA,
    },
    "RetryAfter": {
        "description": "Whole seconds to wait before asking again.",
        "required": True,
        "schema": {"type": "integer", "minimum": 1},
    },
    "WwwAuthenticate": {
        "description": "How to say who is asking.",
        "required": True,
        "schema": {"type": "string"},
    },
    "IdempotentReplayed": {
        "description": "`true` where this is the first answer to this key again.",
        "schema": {"const": "true"},
    },
}
_PARAMETERS: Final[Json] = {
    "RequestId": {
        "name": "X-Request-ID",
        "in": "header",
        "description": "The caller's own id of this request; one that is made here otherwise.",
        "schema": {"type": "string"},
    },
    "CorrelationId": {
        "name": "X-Correlation-ID",
        "in": "header",
        "description": "Joins this request with others; the request's id where it is absent.",
        "schema": {"type": "string"},
    },
    "IdempotencyKey": {
        "name": "Idempotency-Key",
        "in": "header",
        "description": "Within 24 h, the same key with the same body has no second effect and gets "
        "the first answer again, a refusal too, unless it is a 429 or a 5xx. The body's "
        "`idempotency_key` is the same thing.",
        "schema": {"type": "string", "pattern": "^[!-~]{1,255}$"},
    },
}


def api_routes() -> tuple[Route, ...]:
    """Every route of the api listener, to be read: there is nobody behind them."""
    return (
        *PaymentTokenRoutes(cast("Tokens", None)).routes(),
        *SubmissionRoutes(cast("Submissions", None)).routes(),
        *PlatformTokenRoutes(
            cast("PlatformVault", None), once=cast("Once", None), clock=cast("Clock", None)
        ).routes(),
        *CreditRoutes(cast("Ledger", None)).routes(),
        *BillingRoutes(cast("Billing", None), once=cast("Once", None)).routes(),
        *WebhookRoutes(cast("Webhooks", None), limiter=None, draining=lambda: False).routes(),
        *health_routes(cast("Health", None)),
        *docs_routes(b""),
    )


def worker_routes() -> tuple[Route, ...]:
    """Every route of the workers' listener, to be read: there is nobody behind them."""
    return (
        *DetokenizeRoutes(cast("Detokenizer", None)).routes(),
        *SubmissionRoutes(cast("Submissions", None)).routes(),
        *health_routes(cast("Health", None)),
    )


def published() -> bytes:
    """The document of both listeners as it is served and checked in."""
    return written(document(api=api_routes(), workers=worker_routes()))


def written(made: Json) -> bytes:
    """A document as text that is the same each time, and a line a change for whoever reviews it."""
    return (json.dumps(made, indent=1, ensure_ascii=False) + "\n").encode()


def document(*, api: Sequence[Route], workers: Sequence[Route]) -> Json:
    """The document of these routes; what stands on both listeners is told once."""
    shared = {(route.method, route.path) for route in api}
    only_workers = [route for route in workers if (route.method, route.path) not in shared]
    every = (*api, *only_workers)
    schemas, problems = Schemas(_types(every)), ProblemAnswers()
    paths: dict[str, Json] = {}
    for route in sorted(every, key=lambda route: (route.path, route.method)):
        told = _operation(route, schemas, problems)
        if DEVICE in route.access:
            told["servers"] = [_API_SERVER, _WORKERS_SERVER]
        elif route in only_workers:
            told["servers"] = [_WORKERS_SERVER]
            told["description"] = f"{told['description']}\n\n**Where:** the workers' listener."
        paths.setdefault(route.path, {})[route.method.lower()] = told
    used = {operation_of(route).tag for route in every}
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "glamd",
            "version": __version__,
            "summary": "Payment tokens, credits, billing and platform tokens for a commerce "
            "platform.",
            "description": _ABOUT,
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "servers": [_API_SERVER],
        "tags": [
            {"name": name, "description": text} for name, text in TAGS.items() if name in used
        ],
        "paths": paths,
        "components": {
            "schemas": dict(sorted(schemas.components.items())),
            "responses": dict(sorted(problems.components.items())),
            "parameters": _PARAMETERS,
            "headers": _HEADERS,
            "securitySchemes": _SECURITY,
        },
    }


def who_may_call(route: Route) -> str:
    """The route's access in a sentence."""
    if route.public:
        return "Anybody may call."
    told = "; ".join(_who(access) for access in route.access)
    return f"{told[0].upper()}{told[1:]}."


def _who(access: Access) -> str:
    words = [_CALLER[access.kind]]
    if access.scopes:
        plural = "s" if len(access.scopes) > 1 else ""
        words.append(f"with the scope{plural} " + " ".join(f"`{s}`" for s in sorted(access.scopes)))
    if access.services is not None:
        words.append("that the configuration names")
    words.append(_OWNED[access.owner])
    return " ".join(filter(None, words))


def _types(routes: Iterable[Route]) -> dict[str, tuple[object, Mode]]:
    types: dict[str, tuple[object, Mode]] = {}
    for operation in map(operation_of, routes):
        types[f"{operation.id} answer"] = (operation.answer, "serialization")
        if operation.body is not None:
            types[f"{operation.id} body"] = (operation.body, "validation")
        if operation.query is not None:
            types[f"{operation.id} query"] = (operation.query, "validation")
    return types


def _operation(route: Route, schemas: Schemas, problems: ProblemAnswers) -> Json:
    operation = operation_of(route)
    told: Json = {
        "operationId": operation.id,
        "tags": [operation.tag],
        "summary": operation.summary,
        "description": "\n\n".join(
            filter(None, (operation.description, f"**Who:** {who_may_call(route)}"))
        ),
        "security": [{_SCHEME[a.kind]: sorted(a.scopes)} for a in route.access],
        "parameters": _parameters(route, schemas),
    }
    if operation.body is not None:
        content: Json = {"schema": schemas.of(f"{operation.id} body")}
        if operation.body_example is not None:
            content["example"] = operation.body_example
        told["requestBody"] = {"required": operation.body_required, "content": {JSON: content}}
    success = {str(operation.status): _success(operation, schemas)}
    return told | {"responses": success | problems.of(route)}


def _parameters(route: Route, schemas: Schemas) -> list[Json]:
    operation = operation_of(route)
    found = [_in_path(name, operation.params[name]) for name in route.names]
    if operation.query is not None:
        found += _in_query(schemas.taken(f"{operation.id} query"))
    names = ["RequestId", "CorrelationId"]
    if operation.idempotent:
        names.insert(0, "IdempotencyKey")
    return found + [{"$ref": f"#/components/parameters/{name}"} for name in names]


def _in_path(name: str, param: Param) -> Json:
    schema: Json = {"type": "string"}
    if param.format is not None:
        schema["format"] = param.format
    if param.choices is not None:
        schema["enum"] = list(param.choices)
    return {
        "name": name,
        "in": "path",
        "required": True,
        "description": param.description,
        "schema": schema,
        "example": param.example,
    }


def _in_query(schema: Json) -> list[Json]:
    properties = cast("dict[str, Json]", schema["properties"])
    required = cast("list[str]", schema.get("required", []))
    found: list[Json] = []
    for name, whole in properties.items():
        each = without_null(whole)
        parameter: Json = {"name": name, "in": "query", "required": name in required}
        if "description" in each:
            parameter["description"] = each.pop("description")
        found.append(parameter | {"schema": each})
    return found


def _success(operation: Operation, schemas: Schemas) -> Json:
    content: Json = {}
    schema = schemas.of(f"{operation.id} answer")
    example = operation.example
    if operation.enveloped:
        schema = enveloped(schema, paginated=operation.paginated)
        example = enveloped_example(example, paginated=operation.paginated)
    if operation.answer is not bytes:
        content = {"schema": schema, "example": example}
    headers: Json = {**REQUEST_ID, **CORRELATION_ID}
    if operation.idempotent:
        headers["Idempotent-Replayed"] = {"$ref": "#/components/headers/IdempotentReplayed"}
    return {
        "description": HTTPStatus(operation.status).phrase,
        "headers": headers,
        "content": {operation.media_type: content},
    }


if __name__ == "__main__":
    sys.stdout.buffer.write(published())
