"""Ids of transactions are ids of events too, by which JetStream drops repetitions."""

from datetime import UTC, datetime
from itertools import islice, pairwise

from glamd.ledger.journal import new_ids

NOW = datetime(2026, 11, 21, tzinfo=UTC)


def test_whoever_knows_an_id_does_not_know_the_next_one_of_the_same_moment() -> None:
    ids = [each.int for each in islice(new_ids(NOW), 1000)]
    steps = {later - earlier for earlier, later in pairwise(ids)}
    assert min(steps) > 0, "they grow"
    assert len(steps) > 900
