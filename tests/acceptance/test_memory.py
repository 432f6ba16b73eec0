"""The daemon's memory after cards that it has finished with: none of their numbers is there.

The long form of this, with its figures, is `python -m tests.faults --only memory`.
"""

import asyncio
from pathlib import Path

import pytest

from tests.faults.memory_search import CannotLookError, search

CARDS = 200
LOOKS = 20
WAIT_S = 2.0


async def test_no_number_of_a_card_that_was_tokenized_is_left_in_memory(
    state_dir: Path, database_url: str
) -> None:
    try:
        async with asyncio.timeout(50.0):
            found = await search(
                state_dir.parent,
                cards=CARDS,
                looks=LOOKS,
                wait_s=WAIT_S,
                database_url=database_url,
            )
    except CannotLookError as reason:
        pytest.skip(f"not shown here: {reason}")
    assert found.found_by_self_check == CARDS, "a search that misses shows nothing"
    assert found.only_tokenized_found == 0
    assert found.tracks_found == 0
    assert found.used_keys_found == 0
