"""glamctl about the end of tokens and merchants: what is refused, asked and shown."""

import json
from dataclasses import replace
from typing import Any
from uuid import UUID

import pytest
from click.testing import Result

from tests.support.admin_world import AdminWorld
from tests.support.fake_token_life import NOBODY

MERCHANT = "00000000-0000-0000-0000-000000000001"
"""The first that is made."""


def answered(result: Result) -> Any:
    """A command's JSON."""
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


@pytest.fixture
async def merchant(running: AdminWorld) -> str:
    """A merchant's id."""
    await running.merchants.create(platform="custom", shop_id="1", domain="shop.example")
    return MERCHANT


async def test_an_erasure_is_not_begun_unasked_and_not_for_nobody(running: AdminWorld) -> None:
    unasked = await running.glamctl("merchant", "erase", MERCHANT)
    assert unasked.exit_code == 2
    unknown = await running.glamctl("merchant", "erase", str(NOBODY), "--yes")
    assert unknown.exit_code == 1
    assert "MERCHANT_NOT_FOUND" in unknown.stderr
    assert running.erasure.asked == []


async def test_an_erasure_says_what_it_has_deleted_and_knows_who_asked(running: AdminWorld) -> None:
    found = answered(await running.glamctl("merchant", "erase", MERCHANT, "--yes", "--json"))
    assert found == {
        "merchant_id": MERCHANT,
        "payment_tokens": 4,
        "stored_answers": 3,
        "platform_tokens": 1,
        "done": True,
    }
    [(merchant_id, actor)] = running.erasure.asked
    assert merchant_id == UUID(MERCHANT)
    assert actor


@pytest.mark.parametrize(
    ("args", "status"),
    [
        ((), 2),
        (("--token-ttl-h", "soon"), 2),
        (("--token-ttl-h", "nan"), 2),
        (("--sensitive-data", "keep"), 2),
        (("--token-ttl-h", "1e300"), 1),
    ],
)
async def test_settings_that_are_none_are_refused(
    running: AdminWorld, merchant: str, args: tuple[str, ...], status: int
) -> None:
    assert (await running.glamctl("merchant", "set", merchant, *args)).exit_code == status
    assert running.merchants.kept == {}


async def test_settings_are_changed_one_by_one_and_shown(
    running: AdminWorld, merchant: str
) -> None:
    shown = answered(await running.glamctl("merchant", "show", merchant, "--json"))
    assert (shown["token_ttl_s"], shown["sensitive_data"]) == ("default", "drop")
    command = ("merchant", "set", merchant, "--json")
    changed = answered(await running.glamctl(*command, "--token-ttl-h", "0.5"))
    assert (changed["token_ttl_s"], changed["sensitive_data"]) == (1800, "drop")
    await running.glamctl(*command, "--sensitive-data", "until-authorized")
    shown = answered(await running.glamctl("merchant", "show", merchant, "--json"))
    assert (shown["token_ttl_s"], shown["sensitive_data"]) == (1800, "until-authorized")
    changed = answered(await running.glamctl(*command, "--token-ttl-h", "default"))
    assert (changed["token_ttl_s"], changed["sensitive_data"]) == ("default", "until-authorized")


async def test_a_purge_that_could_not_have_a_partition_says_so_and_fails(
    running: AdminWorld,
) -> None:
    done = answered(await running.glamctl("tokens", "purge", "--json"))
    assert done == {
        "expired": 3,
        "answers": 2,
        "metadata": 1,
        "dropped": ["d1"],
        "rewritten": ["d2", "d3"],
        "waiting": [],
    }
    running.token_life.purged = replace(running.token_life.purged, waiting=("d4",))
    result = await running.glamctl("tokens", "purge")
    assert result.exit_code == 1
    assert "d4" in result.stdout


async def test_the_grants_in_force_are_listed_by_worker(running: AdminWorld) -> None:
    found = answered(await running.glamctl("tokens", "grants", "--json"))
    assert found == [
        {
            "worker": "auditor",
            "purposes": ["refund", "settlement"],
            "fields": ["pan", "expiry"],
            "merchants": [str(UUID(int=7))],
            "rate_per_s": 5.0,
        },
        {
            "worker": "settler",
            "purposes": ["refund", "settlement"],
            "fields": ["pan", "expiry"],
            "merchants": "all",
            "rate_per_s": 5.0,
        },
    ]
    assert "settler" in (await running.glamctl("tokens", "grants")).stdout
