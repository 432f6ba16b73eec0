"""What the version after a version is called."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from glamd.keys.version_names import VERSION_BYTES, is_name, next_name

NAMES = st.text("ABCXYZabcxyz0123456789_.-", min_size=1, max_size=VERSION_BYTES)


@pytest.mark.parametrize(
    ("version", "following"),
    [
        ("v1", "v2"),
        ("v9", "v10"),
        ("v099", "v100"),
        ("2024-09", "2024-10"),
        ("2024-99", "2024-100"),
        ("7", "8"),
        ("first", "first-2"),
        ("first-2", "first-3"),
        ("v1.", "v1.-2"),
        ("x" * 32, "x" * 30 + "-2"),
        ("9" * 32, "0" * 32),
        ("v" + "9" * 31, "1" + "0" * 31),
    ],
)
def test_the_number_at_the_end_is_counted_on(version: str, following: str) -> None:
    assert next_name(version, {version}) == following


def test_a_name_that_was_ever_used_is_passed_over() -> None:
    assert next_name("v1", {"v1", "v2", "v3", "v5"}) == "v4"


@given(NAMES, st.sets(NAMES, max_size=8))
def test_every_next_name_is_a_name_and_new(version: str, used: set[str]) -> None:
    following = next_name(version, used | {version})
    assert is_name(following)
    assert following not in used | {version}
