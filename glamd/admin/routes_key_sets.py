"""Admin routes about key sets: base derivation keys that come in, retirement, lists.

A key comes in and none goes out: no answer, log or error here has a byte of one.
"""

import re
from typing import Annotated

from pydantic import Field

from glamd.admin.query import wrong
from glamd.admin.services import KeySets
from glamd.crypto import keyblock
from glamd.crypto.dukpt import Profile
from glamd.errors import ForbiddenError, GlamError, NotFoundError
from glamd.http.bodies import Body
from glamd.http.call import Answer, Call
from glamd.http.routes import OPERATOR, Route
from glamd.keys.key_sets.ceremony import COMPONENTS_MAX, HOLDER_LIMIT_CHARS, Component
from glamd.keys.key_sets.service import (
    COUNTER_WINDOW,
    GENERIC_READER,
    BdkSource,
    HsmKey,
    ProtectedKey,
)
from glamd.keys.key_sets.store import KeySet

Hex = Annotated[str, Field(pattern=r"^(?:[0-9A-Fa-f]{2}){16,32}$")]
Word = Annotated[str, Field(min_length=1, max_length=32)]

SOURCES = ("components", "key_block", "hsm_label", "clear")

_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}", re.ASCII)


class ComponentBody(Body):
    """One component of a key, who typed it, and the check value that its holder has on paper."""

    holder: Annotated[str, Field(min_length=1, max_length=HOLDER_LIMIT_CHARS)]
    hex: Hex
    kcv: Annotated[str, Field(pattern=r"^[0-9A-Fa-f]{6}$")]


Components = Annotated[list[ComponentBody], Field(min_length=1, max_length=COMPONENTS_MAX)]
"""Fewer than make a key are let through: that one of them is wrong may be why no more were typed,
and a ceremony that went wrong is recorded."""


class KeySetBody(Body):
    """A BDK to be imported, and how its devices encrypt; exactly one of the sources is given."""

    key_set: Annotated[str, Field(min_length=1, max_length=64)]
    scheme: Word
    data_usage: Word | None = None
    key_type: Word | None = None
    padding: Word | None = None
    mac: Word | None = None
    reader: Word = GENERIC_READER
    counter_window: int = COUNTER_WINDOW
    components: Components | None = None
    key_block: Annotated[str, Field(max_length=keyblock.FILE_LIMIT_CHARS)] | None = None
    kbpk: Components | None = None
    hsm_label: Annotated[str, Field(min_length=1, max_length=64)] | None = None
    clear: Hex | None = None


class KeySetRoutes:
    """Handlers of the routes about key sets."""

    def __init__(self, keys: KeySets, *, development: bool) -> None:
        self._keys = keys
        self._development = development

    def routes(self) -> tuple[Route, ...]:
        """The table's entries."""
        found = (
            ("GET", "/v1/key-sets", self._list),
            ("POST", "/v1/key-sets", self._import),
            ("POST", "/v1/key-sets/{key_set}/retire", self._retire),
        )
        return tuple(
            Route(method=method, path=path, handler=handler, access=(OPERATOR,))
            for method, path, handler in found
        )

    async def _list(self, _call: Call) -> Answer:
        found = await self._keys.list_key_sets()
        return Answer(
            data={"key_sets": [_as_json(one.key_set) | {"devices": one.devices} for one in found]}
        )

    async def _import(self, call: Call) -> Answer:
        body = await call.json(KeySetBody)
        profile = _profile(body)
        try:
            bdk = self._source(body)
        except GlamError as refused:
            # An import that may not be is an operation on a key as well, and so an audit row.
            await self._keys.refused_import(
                key_set=body.key_set, actor=call.operator.name, code=refused.code
            )
            raise
        made = await self._keys.import_bdk(
            key_set=body.key_set,
            profile=profile,
            bdk=bdk,
            actor=call.operator.name,
            reader=body.reader,
            counter_window=body.counter_window,
        )
        return Answer(data=_as_json(made), status=201)

    def _source(self, body: KeySetBody) -> BdkSource:
        given = [name for name in SOURCES if getattr(body, name) is not None]
        if len(given) != 1:
            raise wrong(given[0] if given else "components", f"One is needed: {_or(SOURCES)}.")
        if (body.kbpk is None) != (body.key_block is None):
            raise wrong("kbpk", "A key block comes with components of its protection key.")
        if body.clear is not None:
            if not self._development:
                raise ForbiddenError("A clear key is taken in development only; use components.")
            return bytes.fromhex(body.clear)
        if body.hsm_label is not None:
            return HsmKey(body.hsm_label)
        if body.key_block is not None:
            return ProtectedKey(body.key_block, _components(body.kbpk))
        return _components(body.components)

    async def _retire(self, call: Call) -> Answer:
        key_set = call.params["key_set"]
        if not _NAME.fullmatch(key_set):
            raise NotFoundError("There is no such key set.", code="KEY_SET_UNKNOWN")
        retired = await self._keys.retire_bdk(key_set, actor=call.operator.name)
        return Answer(data=_as_json(retired))


def _components(parts: list[ComponentBody] | None) -> tuple[Component, ...]:
    return tuple(
        Component(holder=part.holder, key=bytes.fromhex(part.hex), kcv=part.kcv)
        for part in parts or ()
    )


def _or(words: tuple[str, ...]) -> str:
    return f"{', '.join(words[:-1])} or {words[-1]}"


def _profile(body: KeySetBody) -> Profile:
    """The key set's profile, with DUKPT's own defaults where nothing is said."""
    given = {
        name: value
        for name in ("data_usage", "key_type", "padding", "mac")
        if (value := getattr(body, name)) is not None
    }
    return Profile(scheme=body.scheme, **given)


def _as_json(key_set: KeySet) -> dict[str, object]:
    profile = key_set.profile
    return {
        "key_set": key_set.key_set,
        "scheme": profile.scheme,
        "data_usage": profile.data_usage,
        "key_type": profile.key_type,
        "padding": profile.padding,
        "mac": profile.mac,
        "reader": key_set.reader,
        "counter_window": key_set.counter_window,
        "kcv": key_set.kcv,
        "status": key_set.status,
        "provider": key_set.provider,
        "hsm_label": key_set.hsm_label,
        "created_at": key_set.created_at,
        "retired_at": key_set.retired_at,
    }
