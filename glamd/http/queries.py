"""Reading a request's query into a model; the twin of `bodies` for what stands behind the `?`.

What was sent is never echoed. What a model does not know is ignored, as queries collect extras on
their way.
"""

from typing import Final, TypeVar

from aiohttp import web
from pydantic import BaseModel, ConfigDict, ValidationError

from glamd.errors import FieldError, InputError
from glamd.http.bodies import sentence, unfit

WRONG_QUERY: Final = "The query is not as it should be."

_Model = TypeVar("_Model", bound="Query")


class Query(BaseModel):
    """The base of every query model: values come as text and are converted."""

    model_config = ConfigDict(frozen=True, hide_input_in_errors=True, allow_inf_nan=False)


def parse_query(request: web.BaseRequest, model: type[_Model]) -> _Model:
    """The query as `model`. Raises `InputError` (`VALIDATION_ERROR`) naming the fields."""
    given = request.query
    repeated = [name for name in model.model_fields if len(given.getall(name, [])) > 1]
    if repeated:
        raise wrong_query(repeated[0], "This field stands twice.")
    try:
        query = model.model_validate(dict(given))
    except ValidationError as error:
        found = error.errors(include_url=False, include_context=False, include_input=False)
        # `from None`: the cause would carry the input into a log.
        raise InputError(
            WRONG_QUERY,
            fields=[
                FieldError(".".join(map(str, e["loc"])) or "query", sentence(e["type"], e["msg"]))
                for e in found
            ],
        ) from None
    wrong = unfit(query)
    if wrong:
        raise InputError(WRONG_QUERY, fields=wrong)
    return query


def wrong_query(field: str, message: str) -> InputError:
    """The error for one field of a query that its model alone cannot judge."""
    return InputError(WRONG_QUERY, fields=[FieldError(field, message)])
