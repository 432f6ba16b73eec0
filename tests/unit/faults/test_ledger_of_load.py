"""The judge of the token faults: what is right passes, and each kind of wrong has its name."""

import json
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path

import pytest

from tests.faults.ledger_of_load import Acknowledged, Stored, Verdict, held_against

REQUESTS = (("dev-1", "tap-1"), ("dev-2", "tap-2"))


def acknowledged() -> Acknowledged:
    """Two taps, each with its token."""
    found = Acknowledged()
    for number, request in enumerate(REQUESTS, 1):
        found.sent.add(request)
        found.tokens[request].add(f"ptk-{number}")
    return found


def there() -> Stored:
    """What the database has after that."""
    return Stored(
        tokens=frozenset({"ptk-1", "ptk-2"}),
        answers={request: {"token": f"ptk-{n}"} for n, request in enumerate(REQUESTS, 1)},
        broken_counters=0,
    )


def found_in(verdict: Verdict) -> set[str]:
    """The names of what is found."""
    return {each.name for each in fields(verdict) if getattr(verdict, each.name)}


def test_what_is_right_passes() -> None:
    verdict = held_against(acknowledged(), there())
    assert verdict.holds
    assert found_in(verdict) == set()


@pytest.mark.parametrize(
    ("stored", "name"),
    [
        (replace(there(), tokens=frozenset({"ptk-1"})), "lost"),
        (replace(there(), tokens=there().tokens | {"ptk-3"}), "strangers"),
        (replace(there(), broken_counters=1), "broken_counters"),
        (replace(there(), answers={REQUESTS[0]: {"token": "ptk-1"}}), "changed"),
        (replace(there(), answers={key: {"token": "ptk-1"} for key in REQUESTS}), "changed"),
    ],
)
def test_each_wrong_of_the_database_has_its_name(stored: Stored, name: str) -> None:
    verdict = held_against(acknowledged(), stored)
    assert not verdict.holds
    assert found_in(verdict) == {name}


@pytest.mark.parametrize(
    ("change", "names"),
    [
        (lambda a: a.tokens[REQUESTS[0]].add("ptk-9"), {"doubled", "lost"}),
        (lambda a: a.sent.add(("dev-1", "tap-9")), {"unanswered"}),
        (lambda a: a.refused[REQUESTS[0]].add("CARD_UNREADABLE"), {"refused"}),
    ],
)
def test_each_wrong_of_the_answers_has_its_name(
    change: Callable[[Acknowledged], object], names: set[str]
) -> None:
    found = acknowledged()
    change(found)
    verdict = held_against(found, there())
    assert not verdict.holds
    assert found_in(verdict) == names


def test_a_retryable_answer_is_none_and_a_line_cut_short_is_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "record.jsonl"
    sent = {"what": "sent", "id": "tap-1", "device": "dev-1"}
    later = {**sent, "what": "answer", "code": "UNAVAILABLE", "retryable": True}
    path.write_text(f'{json.dumps(sent)}\n{json.dumps(later)}\n{{"what":"answer","id":"tap')
    found = Acknowledged.read(path)
    nothing = Stored(tokens=frozenset(), answers={}, broken_counters=0)
    assert held_against(found, nothing).unanswered == 1
    assert not found.refused
