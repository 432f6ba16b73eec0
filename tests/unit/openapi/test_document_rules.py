"""What the document says of a route follows from its entry alone."""

from typing import Any, cast

import pytest
from pydantic import Field
from typing_extensions import TypedDict

from glamd.http.bodies import Body
from glamd.http.call import Answer, Call
from glamd.http.openapi import document, who_may_call
from glamd.http.openapi_refusals import refusals
from glamd.http.operation import Operation, Param, Refusal
from glamd.http.queries import Query
from glamd.http.routes import WORKER, Access, Route, client, internal

ALWAYS = {
    *("BAD_REQUEST", "BODY_TOO_LARGE", "HEADERS_TOO_LARGE", "INTERNAL_ERROR", "UNAVAILABLE"),
    *("UNSUPPORTED_MEDIA_TYPE", "URI_TOO_LONG"),
}
IDENTIFIED = {"UNAUTHENTICATED", "FORBIDDEN", "RATE_LIMITED"}


class Thing(TypedDict):
    """A thing."""

    name: str


class ThingBody(Body):
    """A thing to be made."""

    name: str


class ThingQuery(Query):
    """Which things."""

    colour: str | None = Field(default=None, description="Of which colour.")
    size: int = 3
    shape: str


async def nothing(_call: Call) -> Answer:
    """Nobody calls it."""
    return Answer(data={})


def route(*access: Access, path: str = "/things", method: str = "GET", **told: Any) -> Route:
    """A route of things."""
    values: dict[str, Any] = {
        "id": "showThing",
        "tag": "Health",
        "summary": "A thing",
        "answer": Thing,
        "example": {"name": "stone"},
    }
    return Route(
        method=method,
        path=path,
        handler=nothing,
        access=access,
        operation=Operation(**(values | told)),
    )


def codes(of: Route) -> set[str]:
    """The codes that a route may answer."""
    return {refusal.code for refusal in refusals(of)}


def told(of: Route, *, worker: bool = False) -> dict[str, Any]:
    """The one operation of a document of this route."""
    made = document(api=() if worker else (of,), workers=(of,) if worker else ())
    paths = cast("dict[str, dict[str, dict[str, Any]]]", made["paths"])
    return paths[of.path][of.method.lower()]


# ---- refusals


def test_a_public_route_refuses_nobody_for_who_they_are() -> None:
    assert codes(route()) == ALWAYS


def test_whoever_must_say_who_they_are_may_be_refused_for_it() -> None:
    assert codes(route(client())) == ALWAYS | IDENTIFIED


def test_a_path_with_parameters_may_lead_nowhere() -> None:
    params = {"thing": Param(description="Its id.", example="a")}
    assert codes(route(path="/things/{thing}", params=params)) == ALWAYS | {"NOT_FOUND"}


def test_a_body_may_be_malformed_and_wrong_a_query_only_wrong() -> None:
    assert codes(route(body=ThingBody)) == ALWAYS | {"MALFORMED_JSON", "VALIDATION_ERROR"}
    assert codes(route(query=ThingQuery)) == ALWAYS | {"VALIDATION_ERROR"}


def test_a_route_for_some_services_refuses_the_others_by_a_code_of_its_own() -> None:
    assert "SERVICE_NOT_ALLOWED" in codes(route(internal(services=["a"])))
    assert "SERVICE_NOT_ALLOWED" not in codes(route(internal("a")))


def test_an_idempotent_route_may_be_asked_too_early_or_for_something_else() -> None:
    of = route(idempotent=True)
    assert codes(of) == ALWAYS | {"IDEMPOTENCY_IN_PROGRESS", "IDEMPOTENCY_KEY_REUSED"}
    names = [each.get("$ref", "").rpartition("/")[2] for each in told(of)["parameters"]]
    assert "IdempotencyKey" in names
    assert "Idempotent-Replayed" in told(of)["responses"]["200"]["headers"]


def test_what_a_route_says_of_a_code_goes_before_what_is_said_in_general() -> None:
    own = Refusal(code="FORBIDDEN", status=403, when="It is raining.")
    found = [r for r in refusals(route(client(), refusals=(own,))) if r.code == "FORBIDDEN"]
    assert found == [own]
    assert "raining" in told(route(client(), refusals=(own,)))["responses"]["403"]["description"]


def test_every_refusal_comes_with_the_headers_that_belong_to_its_status() -> None:
    made = cast("dict[str, Any]", document(api=(route(client()),), workers=()))
    by_status = made["paths"]["/things"]["get"]["responses"]
    shared = made["components"]["responses"]

    def headers(status: str) -> set[str]:
        return set(shared[by_status[status]["$ref"].rpartition("/")[2]]["headers"])

    ids = {"X-Request-ID", "X-Correlation-ID"}
    assert headers("403") == ids
    assert headers("401") == ids | {"WWW-Authenticate"}
    assert headers("429") == headers("503") == ids | {"Retry-After"}


# ---- requests and answers


def test_a_query_is_its_parameters_and_null_is_absence() -> None:
    found = {p["name"]: p for p in told(route(query=ThingQuery))["parameters"] if "name" in p}
    assert found["colour"] == {
        "name": "colour",
        "in": "query",
        "required": False,
        "description": "Of which colour.",
        "schema": {"type": "string"},
    }
    assert found["size"]["schema"] == {"type": "integer", "default": 3}
    assert found["shape"]["required"] is True


def test_a_list_comes_with_its_pagination() -> None:
    operation = told(route(answer=list[Thing], example=[{"name": "stone"}], paginated=True))
    schema = operation["responses"]["200"]["content"]["application/json"]["schema"]
    assert list(schema["properties"]) == ["data", "pagination", "meta"]
    assert schema["required"] == ["data", "pagination", "meta"]


@pytest.mark.parametrize("other", [{"bare": True}, {"media_type": "text/plain", "answer": str}])
def test_a_bare_answer_has_no_envelope(other: dict[str, Any]) -> None:
    (content,) = told(route(**other))["responses"]["200"]["content"].values()
    assert "meta" not in content["schema"].get("properties", {})


def test_an_answer_has_the_status_of_its_route() -> None:
    assert {"201"} == {s for s in told(route(status=201))["responses"] if s < "300"}


# ---- listeners and callers


def test_a_route_of_both_listeners_stands_once_and_one_of_the_workers_says_where() -> None:
    both, theirs = route(), route(WORKER, path="/theirs", id="showTheirs")
    made = document(api=(both,), workers=(both, theirs))
    assert sorted(cast("dict[str, Any]", made["paths"])) == ["/theirs", "/things"]
    assert "servers" not in told(both)
    assert "workers' listener" in told(theirs, worker=True)["description"]
    assert told(theirs, worker=True)["servers"][0]["url"] == "https://{workers_listener}"


def test_who_may_call_is_said_in_words() -> None:
    assert who_may_call(route()) == "Anybody may call."
    assert who_may_call(route(client(), internal("a", "b"))) == (
        "A client for its own merchant; an internal service with the scopes `a` `b` for any "
        "merchant."
    )
    assert who_may_call(route(internal(services=["x"]))) == (
        "An internal service that the configuration names for any merchant."
    )
    assert who_may_call(route(WORKER)) == "A worker within its grant."
