"""The short forms of the fault runs about money: the daemon killed, NATS killed, under load.

Events of others are left to `make faults`: what the daemon had been given when it died, JetStream
gives again after a minute.
"""

from pathlib import Path

import pytest

from tests.faults.kill_money import kill_money
from tests.faults.nats_faults import kill_nats

SEED = 1


@pytest.fixture
def folder(state_dir: Path) -> Path:
    """Where a fault site has its files; its certificates are there already."""
    return state_dir.parent


async def test_no_acknowledged_credit_is_lost_or_moved_twice_when_the_daemon_is_killed(
    folder: Path, database_url: str
) -> None:
    report = await kill_money(
        folder, rounds=2, seed=SEED, database_url=database_url, events_per_s=0.0, life_limit_s=0.4
    )
    assert report.outcome.money.findings == {}
    assert report.outcome.crashes == ()
    assert report.outcome.holds
    assert len(report.ready_s) == 2
    assert report.outcome.account.done


async def test_nobody_who_moves_credits_notices_that_nats_was_killed_and_all_is_told_in_order(
    folder: Path, database_url: str
) -> None:
    report = await kill_nats(
        folder, rounds=2, seed=SEED, database_url=database_url, events_per_s=0.0, life_limit_s=0.4
    )
    assert report.outcome.money.findings == {}
    assert report.outcome.holds
    assert report.failed == {}
    assert len(report.outcome.stream) >= len(report.outcome.books.transactions) > 0
