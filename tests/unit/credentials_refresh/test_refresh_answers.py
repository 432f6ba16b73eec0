"""What an answer means: hostile ones first, then those of real platforms."""

import contextlib
from datetime import UTC, datetime, timedelta
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from glamd.credentials.model import Secret
from glamd.credentials.refresh.answers import RawAnswer, RefreshError, Renewed, judge
from glamd.credentials.refresh.renewer import back_off_s

NOW = datetime(2026, 11, 21, 12, 0, tzinfo=UTC)
OLD = Secret(
    {
        "access_token": "old-access",
        "refresh_token": "old-refresh",
        "expires_in": 3600,
        "associated_user": {"id": 7},
    }
)
GOOD: dict[str, object] = {
    "access_token": "new-access",
    "expires_in": 3600,
    "refresh_token": "new-refresh",
    "refresh_token_expires_in": 7_776_000,
    "scope": "read_products,write_orders",
}
ASSUMED_S = 1800.0


def judged(body: bytes, *, status: int = 200, retry_after: str | None = None) -> Renewed:
    """What `judge` makes of it."""
    answer = RawAnswer(status=status, retry_after=retry_after, body=body)
    return judge(answer, OLD, sent_at=NOW, assumed_lifetime_s=ASSUMED_S)


def good(**changes: Any) -> Renewed:
    """What it makes of a good answer with these changes; None leaves a field out."""
    fields = {**GOOD, **changes}
    return judged(
        orjson.dumps({name: value for name, value in fields.items() if value is not None})
    )


def refused(body: bytes, *, status: int = 200, retry_after: str | None = None) -> RefreshError:
    """The error that it is."""
    with pytest.raises(RefreshError) as caught:
        judged(body, status=status, retry_after=retry_after)
    assert caught.value.__cause__ is None
    return caught.value


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"<html>new-access</html>",
        b"null",
        b"[]",
        b'"new-access"',
        b'{"access_token": "new-access"',
        b'{"access_token": NaN}',
        b'{"access_token": "\xff"}',
        b"[" * 60_000,
        b'{"a":' * 10_000,
    ],
)
def test_a_200_that_is_no_json_object_is_no_answer(body: bytes) -> None:
    error = refused(body)
    assert (error.code, error.remedy) == ("NOT_JSON", "time")


@pytest.mark.parametrize(
    "changes",
    [
        {"access_token": None},
        {"access_token": ""},
        {"access_token": 7},
        {"access_token": ["new-access"]},
        {"access_token": "new\naccess"},
        {"access_token": "new\x00access"},
        {"access_token": "nëw"},
        {"access_token": "x" * 16_385},
        {"refresh_token": 7},
        {"refresh_token": "new\r\nrefresh"},
        {"refresh_token": "x" * 16_385},
        {"token_type": "mac"},
        {"token_type": 7},
    ],
)
def test_a_pair_that_nobody_could_use_is_no_answer(changes: dict[str, object]) -> None:
    with pytest.raises(RefreshError) as caught:
        good(**changes)
    assert (caught.value.code, caught.value.remedy) == ("BAD_ANSWER", "time")


@pytest.mark.parametrize(
    "expires_in",
    [None, 0, -1, -3600.0, 1e30, 10**18, "", "soon", "-5", "1e3", "9" * 13, "٣٦٠٠", True, [], {}],
)
def test_a_lifetime_that_makes_no_sense_does_not_cost_the_pair(expires_in: object) -> None:
    renewed = good(expires_in=expires_in)
    assert renewed.secret.data["access_token"] == "new-access"
    assert renewed.secret.data["expires_in"] == 3600  # as it was stored
    assert renewed.expires_at == NOW + timedelta(seconds=ASSUMED_S)


@pytest.mark.parametrize("expires_in", [7200, 7200.0, "7200"])
def test_a_lifetime_may_be_any_kind_of_numeral(expires_in: object) -> None:
    renewed = good(expires_in=expires_in)
    assert renewed.expires_at == NOW + timedelta(hours=2)
    assert renewed.secret.data["expires_in"] == expires_in


@pytest.mark.parametrize(
    "scope",
    [None, "", " ", ",", 7, ["read"], "a\nb", "é", "x" * 257, " ".join(map(str, range(300)))],
)
def test_scopes_that_cannot_be_read_leave_the_stored_ones(scope: object) -> None:
    renewed = good(scope=scope)
    assert renewed.scopes is None
    assert "scope" not in renewed.secret.data


@pytest.mark.parametrize("scope", ["read,write", "read write", " read, write,,read "])
def test_scopes_are_read_in_either_separator(scope: str) -> None:
    assert good(scope=scope).scopes == ("read", "write")


@pytest.mark.parametrize("refresh_token", [None, ""])
def test_without_a_new_refresh_token_the_old_one_stays(refresh_token: str | None) -> None:
    assert good(refresh_token=refresh_token).secret.data["refresh_token"] == "old-refresh"


def test_everything_else_that_was_stored_stays_and_nothing_else_comes_in() -> None:
    renewed = good(associated_user={"id": 8}, foo="bar", id_token="x", token_type="Bearer")
    assert renewed.secret.data == {
        "access_token": "new-access",
        "refresh_token": "new-refresh",
        "expires_in": 3600,
        "refresh_token_expires_in": 7_776_000,
        "scope": "read_products,write_orders",
        "associated_user": {"id": 7},
    }
    assert "new-" not in repr(renewed)


@pytest.mark.parametrize(
    ("status", "error", "code", "remedy"),
    [
        (400, "invalid_grant", "INVALID_GRANT", "merchant"),
        (401, "invalid_request", "INVALID_REQUEST", "merchant"),  # Shopify's
        (200, "invalid_grant", "INVALID_GRANT", "merchant"),
        (401, "invalid_client", "INVALID_CLIENT", "operator"),
        (400, "unauthorized_client", "UNAUTHORIZED_CLIENT", "operator"),
        (400, "unsupported_grant_type", "UNSUPPORTED_GRANT_TYPE", "operator"),
        (400, "invalid_scope", "INVALID_SCOPE", "operator"),
        (400, "temporarily_unavailable", "TEMPORARILY_UNAVAILABLE", "time"),
        (400, "shpat_secret new-access", "UNKNOWN", "operator"),
        (400, "INVALID_GRANT", "UNKNOWN", "operator"),
    ],
)
def test_only_registered_error_codes_come_through(
    status: int, error: str, code: str, remedy: str
) -> None:
    said = {"error": error, "error_description": "new-access", "error_uri": "https://x"}
    found = refused(orjson.dumps(said), status=status)
    assert (found.code, found.remedy) == (code, remedy)
    assert "new-access" not in f"{found!r} {found.message}"


@pytest.mark.parametrize(
    ("status", "code", "remedy"),
    [
        (301, "REDIRECTED", "operator"),
        (307, "REDIRECTED", "operator"),
        (400, "UNKNOWN", "operator"),
        (402, "UNKNOWN", "operator"),
        (404, "UNKNOWN", "operator"),
        (408, "SERVER_ERROR", "time"),
        (429, "RATE_LIMITED", "time"),
        (500, "SERVER_ERROR", "time"),
        (502, "SERVER_ERROR", "time"),
        (520, "SERVER_ERROR", "time"),
    ],
)
def test_a_status_says_who_mends_it_where_the_body_does_not(
    status: int, code: str, remedy: str
) -> None:
    for body in (b"<html>", b"", orjson.dumps(GOOD)):
        found = refused(body, status=status)
        assert (found.code, found.remedy) == (code, remedy)


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        ("120", 120.0),
        (" 120 ", 120.0),
        ("0", 0.0),
        ("999999999999999999999999", 3600.0),
        ("Sat, 21 Nov 2026 12:02:00 GMT", 120.0),
        ("Sat, 21 Nov 2026 12:02:00 -0000", 120.0),
        ("Sat, 21 Nov 2026 11:00:00 GMT", 0.0),
        ("Sat, 21 Nov 9999 12:02:00 GMT", 3600.0),
        ("-5", None),
        ("1.5", None),
        ("soon", None),
        ("٣", None),
        ("", None),
        (None, None),
    ],
)
def test_retry_after_is_heard_within_bounds(header: str | None, seconds: float | None) -> None:
    for status in (429, 503):
        assert refused(b"", status=status, retry_after=header).retry_after_s == seconds


@given(st.binary(max_size=300), st.integers(100, 599), st.none() | st.text(max_size=40))
def test_whatever_comes_is_an_answer_or_one_of_our_errors(
    body: bytes, status: int, retry_after: str | None
) -> None:
    with contextlib.suppress(RefreshError):
        judged(body, status=status, retry_after=retry_after)


json = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)


@given(st.fixed_dictionaries({}, optional=dict.fromkeys((*GOOD, "error", "token_type"), json)))
def test_whatever_fields_come_the_secret_can_be_sealed_or_there_is_none(
    fields: dict[str, object],
) -> None:
    try:
        renewed = judged(orjson.dumps(fields))
    except RefreshError:
        return
    assert orjson.loads(orjson.dumps(renewed.secret.data)) == renewed.secret.data
    assert renewed.expires_at > NOW


# ---- how long to wait then


def test_what_may_pass_by_itself_is_tried_after_half_a_minute_then_ever_later_up_to_an_hour() -> (
    None
):
    error = RefreshError("TIMEOUT")
    for failures, most in ((1, 30), (2, 60), (4, 240), (8, 3600), (10**6, 3600)):
        pauses = [back_off_s(error, failures=failures, expired_for_s=10**9) for _ in range(200)]
        assert most / 2 <= min(pauses)
        assert max(pauses) <= most
        assert len(set(pauses)) > 100  # so that what failed together does not come back together


def test_a_platform_may_ask_for_more_time_but_not_for_less() -> None:
    slow = RefreshError("RATE_LIMITED", retry_after_s=600.0)
    assert back_off_s(slow, failures=1, expired_for_s=0) == 600.0
    hasty = RefreshError("RATE_LIMITED", retry_after_s=0.0)
    assert back_off_s(hasty, failures=1, expired_for_s=0) >= 15.0


@pytest.mark.parametrize(
    ("remedy", "expired_for_s", "most"),
    [
        ("operator", -600, 900),
        ("operator", 3600, 3600),
        ("operator", 10**9, 6 * 3600),
        ("merchant", -600, 6 * 3600),
        ("merchant", 86_400, 86_400),
        ("merchant", 10**9, 7 * 86_400),
    ],
)
def test_what_somebody_must_mend_is_asked_for_the_more_rarely_the_longer_it_is_dead(
    remedy: Any, expired_for_s: float, most: float
) -> None:
    pause = back_off_s(
        RefreshError("INVALID_GRANT", remedy=remedy), failures=1, expired_for_s=expired_for_s
    )
    assert 0.9 * most <= pause <= most


def test_an_answer_does_not_show_the_pair_that_is_in_it() -> None:
    answer = RawAnswer(status=200, retry_after=None, body=orjson.dumps(GOOD))
    assert "new-access" not in repr(answer)
    assert "new-refresh" not in str(answer)
