"""Admin routes about key providers: how each is, and moving every key to the current one.

No answer here has a byte of a key; names, providers and outcomes are all there is.
"""

from typing import Protocol

from glamd.http.call import Answer, Call
from glamd.http.routes import OPERATOR, Route
from glamd.keys.rewrapping.service import ProviderState, RewrapReport


class KeyMover(Protocol):
    """What moves keys between providers."""

    async def rewrap(self, actor: str) -> RewrapReport:
        """Move them; raises `UnavailableError`."""

    async def providers(self) -> tuple[ProviderState, ...]:
        """Every provider, the current one first."""


class RewrapRoutes:
    """Handlers of the routes about key providers."""

    def __init__(self, mover: KeyMover) -> None:
        self._mover = mover

    def routes(self) -> tuple[Route, ...]:
        """The table's entries."""
        found = (
            ("GET", "/v1/key-providers", self._providers),
            ("POST", "/v1/key-providers/rewrap", self._rewrap),
        )
        return tuple(
            Route(method=method, path=path, handler=handler, access=(OPERATOR,))
            for method, path, handler in found
        )

    async def _providers(self, _call: Call) -> Answer:
        return Answer(data={"providers": [_state(s) for s in await self._mover.providers()]})

    async def _rewrap(self, call: Call) -> Answer:
        report = await self._mover.rewrap(call.operator.name)
        keys = [
            {
                "key": key.key,
                "outcome": key.outcome,
                "before": key.before,
                "provider": key.provider,
                "reason": key.reason,
            }
            for key in report.keys
        ]
        return Answer(
            data={"provider": report.provider, "failed": report.count("failed"), "keys": keys}
        )


def _state(state: ProviderState) -> dict[str, object]:
    return {
        "provider": state.name,
        "current": state.current,
        "configured": state.configured,
        "keys": state.keys,
        "health": "ready" if state.trouble is None else "unavailable",
        "trouble": state.trouble,
    }
