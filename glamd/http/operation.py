"""What a route's entry says for the published document: its models, its answers, its refusals.

Requests are described by the models that validate them, answers by the TypedDicts that handlers
return, so that the type checker holds them to it. The document is made in `openapi`; nothing is
checked against this at run time.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from glamd.http.bodies import Body
from glamd.http.queries import Query

JSON = "application/json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """A code that this route may answer beyond those that every route of its kind may.

    What those are is told in `openapi_refusals`.
    """

    code: str
    status: int
    when: str
    """One sentence."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Param:
    """A path parameter."""

    description: str
    example: str
    format: str | None = None
    """A format of JSON Schema, such as `uuid`."""

    choices: tuple[str, ...] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Operation:
    """One operation of the document; who may call it is in the route's `access`."""

    id: str
    tag: str
    summary: str
    description: str = ""
    params: Mapping[str, Param] = field(default_factory=dict)
    query: type[Query] | None = None
    body: type[Body] | None = None
    body_required: bool = True
    body_example: object = None
    """What the body may look like; it is checked against `body` in the tests."""

    answer: object
    """The type of `data` in the envelope, such as a TypedDict or a list of one; of the whole
    answer, where it is bare. `str` is text and `bytes` is anything."""

    example: object
    """What `answer` may look like; it is checked against it in the tests."""

    status: int = 200
    paginated: bool = False
    media_type: str = JSON
    """Another one is answered bare, without the envelope."""

    bare: bool = False
    """Whether JSON is answered without the envelope."""

    refusals: tuple[Refusal, ...] = ()
    idempotent: bool = False
    """Whether it takes an `Idempotency-Key`."""

    @property
    def enveloped(self) -> bool:
        """Whether the answer is `data` among `meta`."""
        return self.media_type == JSON and not self.bare
