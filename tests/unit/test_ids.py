"""Ids: their form, their order, no twins."""

from datetime import UTC, datetime, timedelta
from uuid import UUID

from glamd.ids import as_uuid, uuid7


def test_a_uuid7_has_its_version_its_time_and_no_twin() -> None:
    now = datetime(2025, 11, 12, 10, 30, 0, 123_456, tzinfo=UTC)
    made = {uuid7(now) for _ in range(1000)}
    assert len(made) == 1000
    for one in made:
        assert (one.version, one.variant) == (7, "specified in RFC 4122")
        assert one.int >> 80 == 1_762_943_400_123
    assert max(made) < uuid7(now + timedelta(milliseconds=1))


def test_only_the_form_with_four_hyphens_is_read_as_a_uuid() -> None:
    text = "0192F0c0-0000-7000-8000-00000000000a"
    assert as_uuid(text) == UUID(text)
    for other in (
        "",
        text + " ",
        text + "\n",
        f"{{{text}}}",
        f"urn:uuid:{text}",
        text.replace("-", ""),
    ):
        assert as_uuid(other) is None, other
