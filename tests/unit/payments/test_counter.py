"""The counter window against a plain set of spent counters."""

from hypothesis import given
from hypothesis import strategies as st

from glamd.payments.counter import CounterWindow

SIZE_BITS = 16


def test_a_spent_counter_is_refused_as_replayed() -> None:
    window = CounterWindow(SIZE_BITS).spend(5)
    assert window.refusal(5) == "KSN_REPLAYED"


def test_a_counter_at_the_edge_of_the_window_passes_and_one_behind_it_is_too_old() -> None:
    window = CounterWindow(SIZE_BITS).spend(100)
    assert window.refusal(100 - SIZE_BITS + 1) is None
    assert window.refusal(100 - SIZE_BITS) == "KSN_TOO_OLD"


def test_a_jump_beyond_the_window_keeps_the_window_bounded() -> None:
    window = CounterWindow(SIZE_BITS).spend(1).spend(2**32 - 1)
    assert len(window.seen_bytes()) == SIZE_BITS // 8
    assert window.refusal(1) == "KSN_TOO_OLD"


def test_a_window_made_smaller_forgets_its_far_end_and_refuses_it_as_too_old() -> None:
    window = CounterWindow(SIZE_BITS).spend(20).spend(10)
    smaller = CounterWindow.load(size_bits=8, highest=window.highest, seen=window.seen_bytes())
    assert smaller.refusal(10) == "KSN_TOO_OLD"
    assert smaller.refusal(20) == "KSN_REPLAYED"


@given(st.lists(st.integers(1, 60), max_size=80))
def test_no_counter_is_ever_spent_twice_whatever_the_order(counters: list[int]) -> None:
    window = CounterWindow(SIZE_BITS)
    spent: set[int] = set()
    for counter in counters:
        refusal = window.refusal(counter)
        if counter in spent:
            assert refusal in {"KSN_REPLAYED", "KSN_TOO_OLD"}
        elif window.highest - counter >= SIZE_BITS:
            assert refusal == "KSN_TOO_OLD"
        else:
            assert refusal is None
        if refusal is None:
            window = window.spend(counter)
            spent.add(counter)
        window = CounterWindow.load(
            size_bits=SIZE_BITS, highest=window.highest, seen=window.seen_bytes()
        )
