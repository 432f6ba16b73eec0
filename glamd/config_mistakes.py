"""How a wrong setting is told: its key, how to mend it, where it came from; never its value.

Which settings there are is `glamd.config`'s; this only turns what pydantic found into words that an
operator can act on.
"""

import difflib
from collections.abc import Iterator, Mapping, Sequence
from typing import get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails, PydanticCustomError

from glamd.config_sources import KeyPath, variable
from glamd.errors import ConfigError, FieldError

MAX_MISTAKES_IN_MESSAGE = 50
"""A file that is not ours at all has a mistake on each line; the first ones tell enough."""

_SEVERAL = "several"

_WORDS = {
    "bool_parsing": "should be true or false",
    "bool_type": "should be true or false",
    "float_parsing": "should be a number",
    "float_type": "should be a number",
    "int_from_float": "should be a whole number",
    "int_parsing": "should be a whole number",
    "int_type": "should be a whole number",
    "literal_error": "should be {expected}",
    "greater_than": "should be more than {gt}",
    "greater_than_equal": "should be at least {ge}",
    "less_than": "should be less than {lt}",
    "less_than_equal": "should be at most {le}",
    "model_type": "should be a table of settings",
    "model_attributes_type": "should be a table of settings",
    "path_type": "should be the path of a file",
    "string_pattern_mismatch": "should be 1 to 64 letters, digits, dots, underscores, hyphens",
    "string_type": "should be text",
    "too_short": "should not be empty",
    "tuple_type": "should be a list",
    "uuid_parsing": "should be a UUID",
    "value_error": "{error}",
}


def several(wrong: Sequence[tuple[str, str]]) -> PydanticCustomError:
    """An error for a validator of a whole section: pairs of a key in it and what is wrong."""
    return PydanticCustomError(_SEVERAL, "is wrong", {"wrong": list(wrong)})


def mistakes_of(
    error: ValidationError, settings: type[BaseModel], origins: Mapping[KeyPath, str]
) -> list[FieldError]:
    """Every mistake in what pydantic found, in the order of the settings."""
    mistakes = []
    for found in error.errors(include_url=False, include_input=False):
        if found["type"] == "default_factory_not_called":
            continue  # another key is wrong from which this one takes its default
        for location, words in _told(found, settings):
            path = tuple(part for part in location if isinstance(part, str))
            nobody = found["type"] == "missing" and len(path) == len(location)
            source = "" if nobody else _source(path, origins)
            mistakes.append(FieldError(_dotted(location), words + source))
    return mistakes


def config_error(mistakes: Sequence[FieldError]) -> ConfigError:
    """One error of all mistakes, whose message is one line."""
    told = [f"{mistake.field} {mistake.message}" for mistake in mistakes[:MAX_MISTAKES_IN_MESSAGE]]
    more = len(mistakes) - len(told)
    if more:
        told.append(f"and {more} more")
    return ConfigError("; ".join(told), fields=mistakes)


def _told(
    found: ErrorDetails, settings: type[BaseModel]
) -> Iterator[tuple[tuple[int | str, ...], str]]:
    kind, location, context = found["type"], found["loc"], found.get("ctx", {})
    path = tuple(part for part in location if isinstance(part, str))
    if kind == _SEVERAL:
        for key, words in context["wrong"]:
            yield (*location, key), words
    elif kind == "missing":
        in_a_list = len(path) < len(location)
        yield (
            location,
            "is required" + ("" if in_a_list else f"; in the environment {variable(path)}"),
        )
    elif kind == "extra_forbidden":
        near = difflib.get_close_matches(path[-1], _keys_beside(settings, path), n=1)
        yield location, "is not a setting" + (f"; did you mean {near[0]}?" if near else "")
    elif kind in _WORDS:
        yield location, _WORDS[kind].format_map(context)
    else:
        yield location, found["msg"].replace("Input should", "should").replace("value is", "is")


def _source(path: KeyPath, origins: Mapping[KeyPath, str]) -> str:
    """Who set it: the key itself, a table or list around it, or something inside of it."""
    for said, origin in origins.items():
        shared = min(len(said), len(path))
        if said[:shared] == path[:shared]:
            return f" (from {origin})"
    return ""


def _keys_beside(settings: type[BaseModel], path: KeyPath) -> list[str]:
    """The keys that there are in the table that the last part of `path` stands in."""
    table = settings
    for part in path[:-1]:
        if part not in table.model_fields:
            continue  # a name that the operator chose, such as a pack's
        annotation = table.model_fields[part].annotation
        inner = [
            kind
            for kind in (annotation, *get_args(annotation))
            if isinstance(kind, type) and issubclass(kind, BaseModel)
        ]
        if not inner:
            return []
        table = inner[0]
    return list(table.model_fields)


def _dotted(location: tuple[int | str, ...]) -> str:
    """`worker.grants[0].fields` of its parts."""
    text = ""
    for part in location:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text
