"""Readiness: parts that are away, break, hang, and are asked by many at once."""

import asyncio
from collections.abc import Awaitable, Callable

import pytest
import structlog

from glamd.http import health
from glamd.http.health import Health, Part
from tests.support.http_fakes import ManualClock

Check = Callable[[], Awaitable[str | None]]


async def fine() -> str | None:
    """All is well."""
    return None


async def away() -> str | None:
    """It is not there."""
    return "it is away"


async def broken() -> str | None:
    """A check that is itself at fault."""
    raise RuntimeError("postgresql://user:secret@host")


async def hangs() -> str | None:
    """A check that never ends."""
    await asyncio.Event().wait()
    return None


def part(check: Check, *, required: bool = True, name: str = "part") -> Part:
    """A part with this check."""
    return Part(name=name, required=required, check=check)


def make(*parts: Part, draining: bool = False) -> Health:
    """Health out of parts."""
    return Health(parts=parts, draining=lambda: draining, clock=ManualClock())


async def test_nothing_to_check_is_ready() -> None:
    assert (await make().readiness()).status == "ready"


async def test_required_and_other_parts_weigh_differently() -> None:
    found = await make(
        part(fine, name="a"), part(away, name="b"), part(away, required=False, name="c")
    ).readiness()
    assert found.status == "unavailable"
    assert found.unavailable == {"b": "it is away"}
    assert found.degraded == {"c": "it is away"}


async def test_a_check_that_breaks_is_a_part_away_and_keeps_its_secret() -> None:
    with structlog.testing.capture_logs() as logs:
        found = await make(part(broken)).readiness()
    assert found.unavailable == {"part": "it could not be asked"}
    assert logs[0]["event"] == "health_check_failed"


async def test_a_check_that_hangs_is_a_part_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "CHECK_TIMEOUT_S", 0.05)
    async with asyncio.timeout(5):
        found = await make(part(hangs), part(fine, name="b")).readiness()
    assert found.unavailable == {"part": "it did not answer in time"}


async def test_many_askers_at_once_are_one_question() -> None:
    asked = 0

    async def counting() -> str | None:
        nonlocal asked
        asked += 1
        await asyncio.sleep(0)
        return None

    ready = make(part(counting))
    await asyncio.gather(*(ready.readiness() for _ in range(50)))
    assert asked == 1


async def test_an_asker_who_goes_away_leaves_the_others_an_answer() -> None:
    entered, gate = asyncio.Event(), asyncio.Event()

    async def gated() -> str | None:
        entered.set()
        await gate.wait()
        return "it is away"

    ready = make(part(gated))
    first = asyncio.create_task(ready.readiness())
    await entered.wait()
    second = asyncio.create_task(ready.readiness())
    first.cancel()
    gate.set()
    async with asyncio.timeout(5):
        assert (await second).status == "unavailable"


async def test_draining_is_not_ready_however_well_the_parts_are() -> None:
    assert (await make(part(fine), draining=True).readiness()).unavailable == {
        "daemon": "it is draining"
    }
