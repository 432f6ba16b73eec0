"""JSON Schemas of the document: pydantic's, of the models that validate and of the answers.

One call makes them all, so that names are given once; the envelope's own types stand here too. No
route is known here.
"""

from collections.abc import Mapping
from datetime import datetime
from typing import Any, Final, Literal, NotRequired

from pydantic import TypeAdapter
from pydantic.json_schema import GenerateJsonSchema
from typing_extensions import TypedDict, override

Json = dict[str, object]
Mode = Literal["validation", "serialization"]

PROBLEM_REF: Final[Json] = {"$ref": "#/components/schemas/Problem"}
META_REF: Final[Json] = {"$ref": "#/components/schemas/Meta"}
PAGINATION_REF: Final[Json] = {"$ref": "#/components/schemas/Pagination"}
REQUEST_ID: Final[Json] = {"X-Request-ID": {"$ref": "#/components/headers/RequestId"}}
CORRELATION_ID: Final[Json] = {"X-Correlation-ID": {"$ref": "#/components/headers/CorrelationId"}}


class Meta(TypedDict):
    """Which request this answers, and when."""

    request_id: str
    correlation_id: str
    timestamp: datetime


class Pagination(TypedDict):
    """Where a page stands in its list; `page` is null where a cursor led to it."""

    page: int | None
    limit: int
    total: int
    pages: int
    has_next: bool
    has_previous: bool
    next_cursor: str | None


class FieldProblem(TypedDict):
    """One field that is wrong: its dotted name and why, never what was sent."""

    field: str
    message: str


class ProblemTwin(TypedDict):
    """The same content in the shape that older clients read."""

    code: str
    message: str
    details: list[FieldProblem]
    balance: NotRequired[int]
    required: NotRequired[int]


class Problem(TypedDict):
    """An error (RFC 9457): `code` is stable and for programs, `detail` is for people.

    `balance` and `required` go with INSUFFICIENT_CREDITS.
    """

    type: str
    title: str
    status: int
    detail: str
    code: str
    errors: NotRequired[list[FieldProblem]]
    balance: NotRequired[int]
    required: NotRequired[int]
    error: ProblemTwin
    meta: Meta


class _Generator(GenerateJsonSchema):
    """pydantic's generator without the titles it makes up from names."""

    @override
    def field_title_should_be_set(self, schema: object) -> bool:
        return False


class Schemas:
    """The schemas of so many types, and the components that they refer to."""

    def __init__(self, types: Mapping[str, tuple[Any, Mode]]) -> None:
        """`types` by a key of the caller's choice, each as it comes in or as it goes out."""
        inputs: list[tuple[str, Mode, TypeAdapter[Any]]] = [
            (key, mode, TypeAdapter(kind)) for key, (kind, mode) in types.items()
        ]
        inputs += [
            (f"every {kind.__name__}", "serialization", TypeAdapter(kind))
            for kind in (Meta, Pagination, Problem)
        ]
        found, definitions = TypeAdapter.json_schemas(
            inputs, ref_template="#/components/schemas/{model}", schema_generator=_Generator
        )
        self._by_key = {key: schema for (key, _), schema in found.items()}
        self.components: dict[str, Json] = {}
        for name, schema in definitions["$defs"].items():
            schema.pop("title", None)
            self.components[name] = schema

    def of(self, key: str) -> Json:
        """The schema of one type."""
        return dict(self._by_key[key])

    def taken(self, key: str) -> Json:
        """The schema of one type in full, which then is no component of its own."""
        name = str(self._by_key[key]["$ref"]).rpartition("/")[2]
        return self.components.pop(name)


def without_null(schema: Json) -> Json:
    """The schema of a parameter, which cannot be null: where it has no value it is absent."""
    choices = schema.get("anyOf")
    if not isinstance(choices, list):
        return schema
    rest = [each for each in choices if each != {"type": "null"}]
    plain = {name: value for name, value in schema.items() if name != "anyOf"}
    if plain.get("default", ...) is None:
        del plain["default"]
    return plain | (rest[0] if len(rest) == 1 else {"anyOf": rest})


def enveloped(data: Json, *, paginated: bool) -> Json:
    """The schema of an answer whose `data` is this."""
    properties: Json = {"data": data}
    if paginated:
        properties["pagination"] = PAGINATION_REF
    properties["meta"] = META_REF
    return {"type": "object", "properties": properties, "required": list(properties)}


def enveloped_example(data: object, *, paginated: bool) -> Json:
    """What such an answer may look like."""
    body: Json = {"data": data}
    if paginated:
        shown = len(data) if isinstance(data, list) else 0
        body["pagination"] = {
            "page": 1,
            "limit": 50,
            "total": shown,
            "pages": 1,
            "has_next": False,
            "has_previous": False,
            "next_cursor": None,
        }
    return body | {"meta": meta_example()}


def meta_example() -> Json:
    """What the `meta` of an answer may look like."""
    return {
        "request_id": "4701d7a7cefb4e1187b4f5a8a121cdde",
        "correlation_id": "4701d7a7cefb4e1187b4f5a8a121cdde",
        "timestamp": "2026-11-21T12:28:48.119298Z",
    }
