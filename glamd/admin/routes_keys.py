"""Admin routes about keys: importing a base derivation key, and lists that show check values.

A key comes in and none goes out: no answer, log or error here has a byte of one.
"""

from typing import Annotated

from pydantic import Field

from glamd.admin.query import wrong
from glamd.admin.services import Keys
from glamd.crypto.dukpt import Profile
from glamd.errors import CryptoError, FieldError, ForbiddenError, GlamError, InputError
from glamd.http.bodies import Body
from glamd.http.call import Answer, Call
from glamd.http.routes import OPERATOR, Route
from glamd.keys.key_sets.ceremony import COMPONENTS_MAX, COMPONENTS_MIN, combine
from glamd.keys.key_sets.store import KeySet
from glamd.keys.store import KeyVersion

Hex = Annotated[str, Field(pattern=r"^(?:[0-9A-Fa-f]{2}){16,32}$")]
Word = Annotated[str, Field(min_length=1, max_length=32)]


class ComponentBody(Body):
    """One component of a BDK, with the check value that its holder has on paper."""

    hex: Hex
    kcv: Annotated[str, Field(pattern=r"^[0-9A-Fa-f]{6}$")]


class KeySetBody(Body):
    """A BDK to be imported, as components or, in development, in the clear."""

    key_set: Annotated[str, Field(min_length=1, max_length=64)]
    scheme: Word
    data_usage: Word | None = None
    key_type: Word | None = None
    padding: Word | None = None
    mac: Word | None = None
    counter_window: int | None = None
    components: (
        Annotated[list[ComponentBody], Field(min_length=COMPONENTS_MIN, max_length=COMPONENTS_MAX)]
        | None
    ) = None
    clear: Hex | None = None


class KeyRoutes:
    """Handlers of the routes about keys."""

    def __init__(self, keys: Keys, *, development: bool) -> None:
        self._keys = keys
        self._development = development

    def routes(self) -> tuple[Route, ...]:
        """The table's entries."""
        found = (
            ("GET", "/v1/keys", self._list_keys),
            ("GET", "/v1/key-sets", self._list_key_sets),
            ("POST", "/v1/key-sets", self._import),
        )
        return tuple(
            Route(method=method, path=path, handler=handler, access=(OPERATOR,))
            for method, path, handler in found
        )

    async def _list_keys(self, _call: Call) -> Answer:
        return Answer(data={"keys": [_version(key) for key in await self._keys.list_keys()]})

    async def _list_key_sets(self, _call: Call) -> Answer:
        found = await self._keys.list_key_sets()
        return Answer(data={"key_sets": [_key_set(key_set) for key_set in found]})

    async def _import(self, call: Call) -> Answer:
        body = await call.json(KeySetBody)
        profile = _profile(body)
        try:
            bdk = self._bdk(body)
        except GlamError as refused:
            # A ceremony that went wrong is an operation on a key as well, and so an audit row.
            await self._keys.refused_import(
                key_set=body.key_set, actor=call.operator.name, code=refused.code
            )
            raise
        window = {} if body.counter_window is None else {"counter_window": body.counter_window}
        try:
            made = await self._keys.import_bdk(
                key_set=body.key_set,
                profile=profile,
                bdk=bdk,
                actor=call.operator.name,
                **window,
            )
        except CryptoError as error:
            raise _unfit(error) from None
        return Answer(data=_key_set(made), status=201)

    def _bdk(self, body: KeySetBody) -> bytes:
        if (body.components is None) == (body.clear is None):
            raise wrong("components", "Either components or a clear key is needed, not both.")
        if body.clear is not None:
            if not self._development:
                raise ForbiddenError("A clear key is taken in development only; use components.")
            return bytes.fromhex(body.clear)
        assert body.components is not None
        try:
            return combine(
                [(bytes.fromhex(part.hex), part.kcv) for part in body.components], body.scheme
            )
        except CryptoError as error:
            raise _unfit(error) from None


def _profile(body: KeySetBody) -> Profile:
    """The key set's profile, with DUKPT's own defaults where nothing is said."""
    given = {
        name: value
        for name in ("data_usage", "key_type", "padding", "mac")
        if (value := getattr(body, name)) is not None
    }
    return Profile(scheme=body.scheme, **given)


def _unfit(error: CryptoError) -> InputError:
    """Here a key that does not verify is what the operator sent, and not our own damage."""
    return InputError(
        error.message, code=error.code, fields=error.fields or [FieldError("bdk", error.message)]
    )


def _version(key: KeyVersion) -> dict[str, object]:
    return {
        "keyring": key.keyring,
        "version": key.version,
        "status": key.status,
        "provider": key.provider,
        "kcv": key.kcv,
        "created_at": key.created_at,
    }


def _key_set(key_set: KeySet) -> dict[str, object]:
    profile = key_set.profile
    return {
        "key_set": key_set.key_set,
        "scheme": profile.scheme,
        "data_usage": profile.data_usage,
        "key_type": profile.key_type,
        "padding": profile.padding,
        "mac": profile.mac,
        "counter_window": key_set.counter_window,
        "kcv": key_set.kcv,
        "status": key_set.status,
        "provider": key_set.provider,
        "created_at": key_set.created_at,
    }
