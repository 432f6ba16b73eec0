"""schemathesis against a running site: who asks, what real things they know, and what came of it.

The document is the judge: an answer that it does not have (status, content type, shape, header) is
a finding, and so is wrong data that is taken or right data that is refused. Everything is seeded.

It runs in a process of its own: warnings that are errors, the recursion limit and connections that
only the garbage collector closes are then nobody's but its own.
"""

import copy
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeAlias

import schemathesis
from schemathesis.config import SchemathesisConfig
from schemathesis.core.failures import Failure, ServerError
from schemathesis.core.parameters import ParameterLocation
from schemathesis.engine import Status, events, from_schema
from schemathesis.openapi.checks import RejectedPositiveData

REQUEST_TIMEOUT_S = 20.0
REAL_EVERY = 2
"""Of so many cases one has real ids in place of made-up ones, so that something is found."""

# What no schema can say of right data: that it was right once (a key that was used, a token that
# ended, credits that are spent), that one field of it depends on another, and what is configured.
BEYOND_SCHEMAS_CODES = frozenset(
    {
        "DECRYPT_FAILED",
        "DEVICE_UNKNOWN",
        "IDEMPOTENCY_KEY_REUSED",
        "INSUFFICIENT_CREDITS",
        "INVALID_PACK",
        "KSN_INVALID",
        "KSN_MISMATCH",
        "KSN_REPLAYED",
        "KSN_TOO_OLD",
        "MAC_INVALID",
        "PLATFORM_ERROR",
        "REQUEST_ID_REUSED",
        "TOKEN_EXPIRED",
        "TOKEN_REVOKED",
    }
)
# Printable by the ledger's rules, and of no more bytes than it keeps. JSON Schema takes 5.0 for an
# integer; credits are never read from a number with a fraction.
_MOVE = frozenset({"amount", "reference_type", "reference_id", "description", "metadata"})
BEYOND_SCHEMAS_FIELDS: Mapping[str, frozenset[str]] = {
    # A cursor is one that was given out and excludes a page; a service must name the merchant.
    "listPaymentTokens": frozenset({"cursor", "merchant_id"}),
    "listCreditTransactions": frozenset({"cursor"}),
    "listPurchases": frozenset({"cursor"}),
    # The header and the field are the same thing.
    "storePlatformToken": frozenset({"idempotency_key"}),
    "startTrial": frozenset({"idempotency_key"}),
    # The shop's own host, or one that is configured.
    "beginPurchase": frozenset({"idempotency_key", "return_url"}),
    # A service must name the device; how long the others are is the scheme's to say.
    "submitTokenizeRequest": frozenset({"device_id", "ksn", "data", "mac"}),
    "consumeCredits": _MOVE,
    "grantCredits": _MOVE,
}
DOCUMENTED_5XX = frozenset({502})
"""What another's server is to blame for: the platform that sells."""

UNSIGNED = frozenset(
    {"POST /api/v1/payment-tokens", "POST /webhooks/shopify", "POST /webhooks/custom"}
)
"""Operations that want a signature, or a card under a device's key, which nobody here can make: all
they get is a refusal.
"""

Operation = Mapping[str, Any]
Case: TypeAlias = schemathesis.Case[Any]


def _everything(_: Operation) -> bool:
    return True


def _with(scheme: str, operation: Operation) -> bool:
    return any(scheme in each for each in operation["security"])


def _with_nothing(operation: Operation) -> bool:
    return not operation["security"]


def _of_workers(operation: Operation) -> bool:
    return _with("workerCertificate", operation) or "Health" in operation["tags"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Asker:
    """Somebody who asks: where, as whom, and for which operations."""

    name: str
    url: str
    headers: Mapping[str, str] = field(default_factory=dict)
    certificate: Path | None = None
    key: Path | None = None
    server_ca: Path | None = None
    asks: Callable[[Operation], bool] = _everything


@dataclass(slots=True)
class Findings:
    """What was asked and what came of it."""

    cases: Counter[str] = field(default_factory=Counter)
    """Requests by operation."""

    answers: Counter[tuple[str, int]] = field(default_factory=Counter)
    """Answers by operation and status."""

    failures: list[str] = field(default_factory=list)
    """What contradicts the document, each with a request that shows it."""

    def add(self, other: "Findings") -> None:
        """Take in what another one found."""
        self.cases += other.cases
        self.answers += other.answers
        self.failures += other.failures


def everybody(
    *,
    api_url: str,
    worker_url: str,
    client: Mapping[str, str],
    internal: Mapping[str, str],
    certificate: Path,
    key: Path,
    server_ca: Path,
) -> tuple[Asker, ...]:
    """A worker, nobody in particular, a client and an internal service, by their credentials.

    The worker comes first, while the tokens that it knows are not yet revoked by the others.
    """
    return (
        Asker(
            name="worker",
            url=worker_url,
            certificate=certificate,
            key=key,
            server_ca=server_ca,
            asks=_of_workers,
        ),
        Asker(name="nobody", url=api_url, asks=_with_nothing),
        Asker(name="client", url=api_url, headers=client, asks=partial(_with, "clientToken")),
        Asker(name="internal", url=api_url, headers=internal, asks=partial(_with, "internalToken")),
    )


def strict(document: Mapping[str, Any]) -> dict[str, Any]:
    """The document without leave for fields that it does not have.

    Clients must expect new ones; here, one that nobody described is a mistake.
    """
    whole = copy.deepcopy(dict(document))
    _close(whole)
    return whole


def _close(part: object) -> None:
    if isinstance(part, dict):
        if part.get("type") == "object" and "properties" in part:
            part.setdefault("additionalProperties", False)
        for value in part.values():
            _close(value)
    elif isinstance(part, list):
        for value in part:
            _close(value)


def fuzz(
    document: Mapping[str, Any],
    askers: Iterable[Asker],
    *,
    real: Mapping[str, Sequence[str]],
    cases: int,
    seed: int,
) -> Findings:
    """Ask, one asker after the other, all their operations: each boundary once, `cases` drawn ones.

    `real` are values that exist, by the name of the parameter or of the body's field.
    """
    found = Findings()
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as own_process:
        for asker in askers:
            asking = own_process.submit(_fuzz, document, asker, real, cases, seed)
            found.add(asking.result())
    return found


def _fuzz(
    document: Mapping[str, Any],
    asker: Asker,
    real: Mapping[str, Sequence[str]],
    cases: int,
    seed: int,
) -> Findings:
    schema = schemathesis.openapi.from_dict(strict(document), config=_config(asker, cases, seed))
    schema.hook("map_case")(_with_real(real))
    schema.hook("filter_failure")(_is_finding)
    found = Findings()
    for event in from_schema(schema.include(operation_id=_asked(document, asker))).execute():
        if isinstance(event, events.ScenarioFinished):
            _note(event, asker, found)
        elif isinstance(event, events.NonFatalError):
            told = "".join(traceback.format_exception(event.value))
            found.failures.append(f"{asker.name}: {event.label}: {event.info.message}\n{told}")
        elif isinstance(event, events.FatalError):
            raise event.exception
    return found


def _asked(document: Mapping[str, Any], asker: Asker) -> list[str]:
    return [
        operation["operationId"]
        for methods in document["paths"].values()
        for operation in methods.values()
        if asker.asks(operation)
    ]


def _config(asker: Asker, cases: int, seed: int) -> SchemathesisConfig:
    settings: dict[str, Any] = {
        "seed": seed,
        "base-url": asker.url,
        "headers": dict(asker.headers),
        # It would take a route with a token in its name for one that gives out credentials.
        "auth": {"auto-signup": False},
        "request-timeout": REQUEST_TIMEOUT_S,
        "continue-on-failure": True,
        "generation": {"max-examples": cases, "no-shrink": True, "database": "none"},
        "phases": {"stateful": {"enabled": False}},
    }
    if asker.certificate is not None:
        settings["request-cert"] = str(asker.certificate)
        settings["request-cert-key"] = str(asker.key)
        settings["tls-verify"] = str(asker.server_ca)
    return SchemathesisConfig.from_dict(settings)


def _with_real(
    real: Mapping[str, Sequence[str]],
) -> Callable[[schemathesis.HookContext, Case], Case]:
    turns = count()

    def replaced(case: Case, location: ParameterLocation, values: Any, turn: int) -> Any:
        # What was made wrong stays wrong.
        wrong = case.meta is not None and case.meta.is_negative_at(location)
        if wrong or not isinstance(values, dict):
            return values
        known = {name: real[name] for name in values.keys() & real.keys()}
        return values | {name: some[turn % len(some)] for name, some in known.items()}

    def map_case(_: schemathesis.HookContext, case: Case) -> Case:
        turn, other = divmod(next(turns), REAL_EVERY)
        if not other:
            path, query, body = case.path_parameters, case.query, case.body
            case.path_parameters = replaced(case, ParameterLocation.PATH, path, turn)
            case.query = replaced(case, ParameterLocation.QUERY, query, turn)
            case.body = replaced(case, ParameterLocation.BODY, body, turn)
        return case

    return map_case


def _is_finding(
    _: schemathesis.HookContext, failure: Failure, case: Case, response: schemathesis.Response
) -> bool:
    if isinstance(failure, ServerError) and response.status_code in DOCUMENTED_5XX:
        return False  # that the document has it is another check's
    if not isinstance(failure, RejectedPositiveData):
        return True
    problem = response.json()
    depend = BEYOND_SCHEMAS_FIELDS.get(case.operation.definition.raw["operationId"], frozenset())
    wrong = {each["field"] for each in problem.get("errors", ())}
    return problem["code"] not in BEYOND_SCHEMAS_CODES and not (wrong and wrong <= depend)


def _note(event: events.ScenarioFinished, asker: Asker, found: Findings) -> None:
    label = event.label or ""
    if event.status not in (Status.SUCCESS, Status.FAILURE, Status.SKIP):
        found.failures.append(f"{asker.name}: {label}: {event.status} in {event.phase}")
    for interaction in event.recorder.interactions.values():
        found.cases[label] += 1
        if interaction.response is not None:
            found.answers[label, interaction.response.status_code] += 1
    for checks in event.recorder.checks.values():
        for check in checks:
            if check.failure_info is not None:
                told = check.failure_info.failure
                found.failures.append(
                    f"{asker.name}: {label}: {told.title}\n{told.message}\n"
                    f"{check.failure_info.code_sample}"
                )
