"""glamctl about key providers, against a running admin server: questions, failures, answers."""

import json

import pytest

from glamd.errors import UnavailableError
from glamd.keys.rewrapping.service import ProviderState, Rewrapped, RewrapReport
from tests.support.admin_world import AdminWorld

DONE = Rewrapped(key="payment-tokens:v1", outcome="rewrapped", before="local", provider="aws-kms")
FAILED = Rewrapped(
    key="audit:v1",
    outcome="failed",
    before="local",
    provider="local",
    reason="the wrapped key audit:v1 does not open under this key-encryption key",
)


class Mover:
    """Answers as the test says, and remembers who asked."""

    def __init__(self, *keys: Rewrapped) -> None:
        self.keys = keys
        self.error: Exception | None = None
        self.actors: list[str] = []

    async def rewrap(self, actor: str) -> RewrapReport:
        if self.error is not None:
            raise self.error
        self.actors.append(actor)
        return RewrapReport("aws-kms", self.keys)

    async def providers(self) -> tuple[ProviderState, ...]:
        return (
            ProviderState(name="aws-kms", current=True, configured=True, keys=3, trouble=None),
            ProviderState(
                name="local", current=False, configured=True, keys=1, trouble="It is away."
            ),
        )


@pytest.fixture
def mover(admin: AdminWorld) -> Mover:
    admin.mover = mover = Mover(DONE)
    return mover


async def test_rewrap_asks_and_does_nothing_without_an_answer(
    mover: Mover, running: AdminWorld
) -> None:
    result = await running.glamctl("keys", "rewrap")
    assert result.exit_code == 2
    assert "say --yes" in result.stderr
    assert not mover.actors


async def test_a_key_that_was_not_moved_is_an_exit_status_and_shows_its_reason(
    mover: Mover, running: AdminWorld
) -> None:
    mover.keys = (DONE, FAILED)
    result = await running.glamctl("keys", "rewrap", "--yes")
    assert result.exit_code == 1
    assert "does not open under this key-encryption key" in result.stdout
    assert result.stderr == "Keys that were not moved: 1.\n"
    result = await running.glamctl("keys", "rewrap", "--yes", "--json")
    assert result.exit_code == 1
    assert json.loads(result.stdout)["failed"] == 1


async def test_a_provider_that_is_away_is_one_clear_line(mover: Mover, running: AdminWorld) -> None:
    mover.error = UnavailableError("AWS KMS cannot be asked for DescribeKey: no answer.")
    result = await running.glamctl("keys", "rewrap", "--yes")
    assert result.exit_code == 1
    assert result.stderr.startswith("UNAVAILABLE: AWS KMS cannot be asked")
    assert result.stderr.count("\n") == 1


async def test_rewrap_names_the_operator_and_each_key(mover: Mover, running: AdminWorld) -> None:
    result = await running.glamctl("--json", "keys", "rewrap", "--yes")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout) == {
        "provider": "aws-kms",
        "failed": 0,
        "keys": [
            {
                "key": "payment-tokens:v1",
                "outcome": "rewrapped",
                "before": "local",
                "provider": "aws-kms",
                "reason": None,
            }
        ],
    }
    assert [actor.startswith("uid:") for actor in mover.actors] == [True]


async def test_providers_shows_who_wraps_who_still_holds_keys_and_how_each_is(
    mover: Mover, running: AdminWorld
) -> None:
    result = await running.glamctl("keys", "providers", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout) == [
        {
            "provider": "aws-kms",
            "current": True,
            "configured": True,
            "keys": 3,
            "health": "ready",
            "trouble": None,
        },
        {
            "provider": "local",
            "current": False,
            "configured": True,
            "keys": 1,
            "health": "unavailable",
            "trouble": "It is away.",
        },
    ]
    assert "It is away." in (await running.glamctl("keys", "providers")).stdout
