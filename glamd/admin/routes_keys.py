"""Admin routes about data keys: lists, the steps of a version's life, and how far they are.

Check values go out and never a key: wrapped or not, no answer, log or error here has a byte of one.
"""

from collections.abc import Mapping
from typing import Protocol

from glamd.admin.services import Keys
from glamd.http.call import Answer, Call
from glamd.http.routes import OPERATOR, Handler, Route
from glamd.keys.lifecycle import KeyringStatus
from glamd.keys.store import KeyVersion


class Life(Protocol):
    """The steps of a version's life."""

    async def rotate(self, keyring: str, *, actor: str) -> KeyVersion:
        """Make the next version active; raises `NotFoundError`, `ConflictError`."""

    async def retire(self, keyring: str, version: str, *, actor: str) -> KeyVersion:
        """No row needs it; raises `NotFoundError`, `ConflictError`."""

    async def destroy(self, keyring: str, version: str, *, actor: str) -> KeyVersion:
        """Erase it; raises `NotFoundError`, `ConflictError`."""

    async def status(self) -> Mapping[str, KeyringStatus]:
        """Where each keyring stands."""


class KeyRoutes:
    """Handlers of the routes about keys."""

    def __init__(self, keys: Keys) -> None:
        self._keys = keys

    def routes(self) -> tuple[Route, ...]:
        """The table's entries."""
        return (_route("GET", "/v1/keys", self._list_keys),)

    async def _list_keys(self, _call: Call) -> Answer:
        return Answer(data={"keys": [_version(key) for key in await self._keys.list_keys()]})


class KeyLifeRoutes:
    """Handlers of the routes about the life of a version."""

    def __init__(self, life: Life) -> None:
        self._life = life

    def routes(self) -> tuple[Route, ...]:
        """The table's entries."""
        return (
            _route("GET", "/v1/keyrings", self._status),
            _route("POST", "/v1/keyrings/{keyring}/rotate", self._rotate),
            _route("POST", "/v1/keyrings/{keyring}/{version}/retire", self._retire),
            _route("POST", "/v1/keyrings/{keyring}/{version}/destroy", self._destroy),
        )

    async def _status(self, _call: Call) -> Answer:
        found = await self._life.status()
        return Answer(data={name: _keyring(status) for name, status in found.items()})

    async def _rotate(self, call: Call) -> Answer:
        made = await self._life.rotate(call.params["keyring"], actor=call.operator.name)
        return Answer(data=_version(made))

    async def _retire(self, call: Call) -> Answer:
        keyring, version = call.params["keyring"], call.params["version"]
        return Answer(
            data=_version(await self._life.retire(keyring, version, actor=call.operator.name))
        )

    async def _destroy(self, call: Call) -> Answer:
        keyring, version = call.params["keyring"], call.params["version"]
        return Answer(
            data=_version(await self._life.destroy(keyring, version, actor=call.operator.name))
        )


def _route(method: str, path: str, handler: Handler) -> Route:
    return Route(method=method, path=path, handler=handler, access=(OPERATOR,))


def _keyring(status: KeyringStatus) -> dict[str, object]:
    return {
        "active": status.active,
        "remaining": status.remaining,
        "rate": status.rate,
        "eta_s": status.eta_s,
        "done": status.done,
        "damaged": status.damaged,
        "started_at": status.started_at,
        "finished_at": status.finished_at,
        "cryptoperiod_ends_at": status.cryptoperiod_ends_at,
        "warnings": list(status.warnings),
        "versions": [_version(version) for version in status.versions],
    }


def _version(key: KeyVersion) -> dict[str, object]:
    return {
        "keyring": key.keyring,
        "version": key.version,
        "status": key.status,
        "provider": key.provider,
        "kcv": key.kcv,
        "created_at": key.created_at,
        "activated_at": key.activated_at,
        "retired_at": key.retired_at,
        "destroyed_at": key.destroyed_at,
    }
