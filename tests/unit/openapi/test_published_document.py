"""The document as it is checked in: of this code, valid, whole, and with examples that are true."""

import ast
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import jsonschema_rs
import pytest
import schemathesis

import glamd
from glamd.errors import GlamError
from glamd.http import openapi, problems, submissions
from glamd.http.middleware import Pipeline
from glamd.http.openapi_refusals import GENERAL, operation_of
from glamd.http.problems import RepeatedError, status_of
from glamd.http.routes import Route
from tests.support.http_world import World

ROOT = Path(glamd.__file__).parent.parent
CHECKED_IN = ROOT / "docs" / "openapi.json"
ROUTES = (*openapi.api_routes(), *openapi.worker_routes())
JSON_SCHEMA = "https://json-schema.org/draft/2020-12/schema"
NAMES = [f"{route.method} {route.path}" for route in ROUTES]

# The general codes of spec 1 and those of the routes that there are.
CODES_OF_THE_CONTRACT = {
    *("MALFORMED_JSON", "UNAUTHENTICATED", "FORBIDDEN", "NOT_FOUND", "METHOD_NOT_ALLOWED"),
    *("BODY_TOO_LARGE", "UNSUPPORTED_MEDIA_TYPE", "VALIDATION_ERROR", "RATE_LIMITED"),
    *("INTERNAL_ERROR", "UNAVAILABLE", "IDEMPOTENCY_KEY_REUSED", "IDEMPOTENCY_IN_PROGRESS"),
    *("DOMAIN_MISMATCH", "SERVICE_NOT_ALLOWED"),
    *("TOKEN_NOT_FOUND", "TOKEN_EXPIRED", "TOKEN_REVOKED"),
    *("MALFORMED", "UNSUPPORTED", "DEVICE_UNKNOWN", "DEVICE_SUSPENDED", "DEVICE_REVOKED"),
    *("KEY_SET_UNKNOWN", "KSN_MISMATCH", "KSN_INVALID", "KSN_REPLAYED", "KSN_TOO_OLD"),
    *("MAC_INVALID", "DECRYPT_FAILED", "REQUEST_ID_REUSED", "INTERNAL"),
}


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    """The document that the code makes."""
    return cast("dict[str, Any]", json.loads(openapi.published()))


def operations(document: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every operation, by its method and path."""
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            yield f"{method.upper()} {path}", operation


def answers(document: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Every answer of every operation, by the operation and the status."""
    for name, operation in operations(document):
        for status, answer in operation["responses"].items():
            yield name, status, resolved(document, answer)


def resolved(document: dict[str, Any], part: dict[str, Any]) -> dict[str, Any]:
    """What a reference stands for."""
    if "$ref" not in part:
        return part
    found: Any = document
    for name in part["$ref"].removeprefix("#/").split("/"):
        found = found[name]
    return cast("dict[str, Any]", found)


def validator(document: dict[str, Any], schema: dict[str, Any]) -> jsonschema_rs.Validator:
    """Judges values by a schema of the document."""
    whole = {**schema, "components": document["components"]}
    return jsonschema_rs.Draft202012Validator(whole, validate_formats=True)


def parts(part: object, name: str = "") -> Iterator[tuple[str, object]]:
    """Everything in the document, by the key it stands under."""
    yield name, part
    if isinstance(part, dict):
        for key, value in part.items():
            yield from parts(value, key)
    elif isinstance(part, list):
        for value in part:
            yield from parts(value, name)


# ---- it is of this code


def test_the_checked_in_document_is_the_one_that_the_code_makes() -> None:
    assert CHECKED_IN.read_bytes() == openapi.published(), (
        "docs/openapi.json is not of this code any more. Write it anew: make docs"
    )


def test_the_command_writes_the_same_whatever_the_seed_of_hashes() -> None:
    command = [sys.executable, "-m", "glamd.http.openapi"]
    for seed in ("1", "2"):
        run = subprocess.run(
            command, cwd=ROOT, env={"PYTHONHASHSEED": seed}, capture_output=True, check=True
        )
        assert run.stdout == openapi.published()
        assert not run.stderr


async def test_what_is_published_are_the_routes_that_the_listeners_have() -> None:
    world = World()
    for server, published in (
        (world.api_server(), openapi.api_routes()),
        (world.worker_server(), openapi.worker_routes()),
    ):
        pipeline = cast("Pipeline", server._listener._dispatch)
        assert described(pipeline._table.routes) == described(published)


def described(routes: tuple[Route, ...]) -> dict[str, object]:
    """What the document says of routes, but for the services that a configuration may name."""
    return {
        f"{route.method} {route.path}": (
            [(a.kind, a.owner, a.scopes, a.services is not None) for a in route.access],
            operation_of(route),
        )
        for route in routes
    }


# ---- it is valid, and says nothing it should not


def test_it_is_valid_openapi_with_valid_schemas_in_it(document: dict[str, Any]) -> None:
    assert document["openapi"].startswith("3.1.")
    schemathesis.openapi.from_dict(document).validate()
    for name, part in parts(document):
        if name == "schema" or name in document["components"]["schemas"]:
            assert isinstance(part, dict)
            jsonschema_rs.meta.validate({**part, "$schema": JSON_SCHEMA})
            validator(document, part)


def test_every_reference_leads_somewhere_and_every_component_is_used(
    document: dict[str, Any],
) -> None:
    references = {str(part) for name, part in parts(document) if name == "$ref"}
    for reference in references:
        assert resolved(document, {"$ref": reference})
    for kind in ("schemas", "responses", "parameters", "headers"):
        for name in document["components"][kind]:
            assert f"#/components/{kind}/{name}" in references


def test_it_names_no_machine_no_address_and_no_secret(document: dict[str, Any]) -> None:
    text = openapi.published().decode()
    hosts = set(re.findall(r"https?://[^\s\"/]+", text))
    assert hosts == {"https://{workers_listener}", "https://shop.example.com"}
    for word in (str(ROOT), str(Path.home()), tempfile.gettempdir(), "eyJ", "BEGIN ", ":8080"):
        assert word not in text
    assert [server["url"] for server in document["servers"]] == ["/"]


# ---- it is whole


def test_every_operation_has_one_id_a_told_tag_and_a_summary(document: dict[str, Any]) -> None:
    ids = [operation["operationId"] for _, operation in operations(document)]
    assert len(set(ids)) == len(ids)
    tags = {tag["name"] for tag in document["tags"]}
    for name, operation in operations(document):
        assert re.fullmatch(r"[a-z][A-Za-z]+", operation["operationId"]), name
        assert set(operation["tags"]) <= tags, name
        # No Markdown in it: the page shows a summary as it is.
        assert re.fullmatch(r"[A-Z][^`*]+[^`*.]", operation["summary"]), name


@pytest.mark.parametrize("route", ROUTES, ids=NAMES)
def test_a_route_tells_of_its_parameters_and_its_body(route: Route) -> None:
    operation = operation_of(route)
    assert tuple(operation.params) == route.names
    if operation.body is not None:
        assert operation.body_example is not None
        operation.body.model_validate_json(json.dumps(operation.body_example))


def test_who_may_call_is_what_the_route_table_checks(document: dict[str, Any]) -> None:
    schemes = {
        "client": "clientToken",
        "internal": "internalToken",
        "worker": "workerCertificate",
        "device": "deviceCertificate",
    }
    assert set(document["components"]["securitySchemes"]) == set(schemes.values())
    for route in ROUTES:
        operation = document["paths"][route.path][route.method.lower()]
        assert operation["security"] == [
            {schemes[access.kind]: sorted(access.scopes)} for access in route.access
        ]
        assert openapi.who_may_call(route) in operation["description"]


def test_every_code_of_the_contract_is_told(document: dict[str, Any]) -> None:
    text = json.dumps(document)
    assert {code for code in CODES_OF_THE_CONTRACT if f'"{code}"' not in text} == {
        # No operation answers it: it is the answer where there is none.
        "METHOD_NOT_ALLOWED"
    }
    assert "METHOD_NOT_ALLOWED" in document["info"]["description"]


def test_every_code_that_is_told_is_raised_and_has_that_status(document: dict[str, Any]) -> None:
    raised = codes_raised()
    for name, status, answer in answers(document):
        problem = answer["content"].get("application/problem+json")
        if problem is None:
            assert int(status) < 300, name
            continue
        rules = problem["schema"]["allOf"][1]["properties"]
        assert rules["status"]["const"] == int(status)
        for code in rules["code"]["enum"]:
            assert int(status) in raised.get(code, ()), f"{name} {status} {code}"
    for refusal in GENERAL.values():
        assert refusal.status in raised[refusal.code]


def codes_raised() -> dict[str, set[int]]:
    """Every code that is raised anywhere in the code, and the statuses that it is answered with."""
    kinds = {kind.__name__: kind for kind in every_kind(GlamError)}
    found = {code: {status} for code, status in problems._STATUS_BY_CODE.items()}
    for kind in kinds.values():
        found.setdefault(kind.default_code, set()).add(status_of(made(kind, kind.default_code)))
    for code, kind in submissions.KINDS.items():
        found.setdefault(code, set()).add(status_of(made(kind, code)))
    for file in (ROOT / "glamd").rglob("*.py"):
        tree = ast.parse(file.read_text())
        constants = dict(string_constants(tree))
        for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
            raised = kinds.get(getattr(call.func, "id", ""))
            for word in call.keywords:
                if raised is not None and word.arg == "code":
                    code = constants.get(getattr(word.value, "id", ""), "")
                    code = str(getattr(word.value, "value", code))
                    found.setdefault(code, set()).add(status_of(made(raised, code)))
    return found


def every_kind(kind: type[GlamError]) -> Iterator[type[GlamError]]:
    """An error and all of its children, but for the one that repeats what another one was."""
    yield kind
    for child in kind.__subclasses__():
        if child is not RepeatedError:
            yield from every_kind(child)


def made(kind: type[GlamError], code: str) -> GlamError:
    """An error of this kind and code, however it is constructed otherwise."""
    error = kind.__new__(kind)
    error.code = code
    return error


def string_constants(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """The module's names for texts."""
    for node in tree.body:
        if isinstance(node, ast.Assign | ast.AnnAssign) and isinstance(node.value, ast.Constant):
            target = node.targets[0] if isinstance(node, ast.Assign) else node.target
            if isinstance(target, ast.Name) and isinstance(node.value.value, str):
                yield target.id, node.value.value


# ---- its examples are true


def test_every_example_of_an_answer_is_one(document: dict[str, Any]) -> None:
    judged = 0
    for name, status, answer in answers(document):
        for content in answer["content"].values():
            examples = [each["value"] for each in content.get("examples", {}).values()]
            examples += [content["example"]] if "example" in content else []
            for example in examples:
                assert not list(validator(document, content["schema"]).iter_errors(example)), (
                    f"{name} {status}: {example}"
                )
                judged += 1
    assert judged > len(ROUTES)


def test_every_example_of_a_request_is_one(document: dict[str, Any]) -> None:
    for name, operation in operations(document):
        for parameter in (resolved(document, each) for each in operation["parameters"]):
            if "example" in parameter:
                schema = validator(document, parameter["schema"])
                assert schema.is_valid(parameter["example"]), name
        if "requestBody" in operation:
            content = operation["requestBody"]["content"]["application/json"]
            assert validator(document, content["schema"]).is_valid(content["example"]), name


def test_an_answer_is_judged_by_its_schema_at_all(document: dict[str, Any]) -> None:
    found = document["paths"]["/api/v1/payment-tokens/{token}"]["get"]["responses"]["200"]
    content = found["content"]["application/json"]
    judge = validator(document, content["schema"])
    for wrong in ({"status": "lost"}, {"created_at": "yesterday"}, {"exp_month": "12"}):
        example = content["example"] | {"data": content["example"]["data"] | wrong}
        assert not judge.is_valid(example)
