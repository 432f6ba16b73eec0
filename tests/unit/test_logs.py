"""Log lines as an operator reads them: one JSON object each, nothing secret, whoever logged it."""

import io
import json
import logging
import pty
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest
import structlog
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from glamd import logs
from glamd.redaction import redact, redact_text

VISA = "4111111111111111"
KEY = "0123456789abcdef0123456789abcdef"


@pytest.fixture
def stream() -> Iterator[io.StringIO]:
    hook, level = sys.excepthook, logging.getLogger().level
    text = io.StringIO()
    logs.configure("info", "json", text)
    yield text
    structlog.reset_defaults()
    structlog.contextvars.clear_contextvars()
    sys.excepthook = hook
    root = logging.getLogger()
    root.setLevel(level)
    for handler in [handler for handler in root.handlers if isinstance(handler, logs._Handler)]:
        root.removeHandler(handler)


def lines(stream: io.StringIO) -> list[dict[str, object]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_a_line_is_one_json_object_that_begins_with_event_level_and_time(
    stream: io.StringIO,
) -> None:
    structlog.contextvars.bind_contextvars(request_id="r-1", correlation_id="c-1")
    structlog.get_logger().info("device_enrolled", device_id="t-1", merchant_id="m-1", note="a\nb")
    (line,) = lines(stream)
    assert list(line)[:3] == ["event", "level", "time"]
    assert str(line.pop("time")).endswith("Z")
    assert line == {
        "event": "device_enrolled",
        "level": "info",
        "request_id": "r-1",
        "correlation_id": "c-1",
        "device_id": "t-1",
        "merchant_id": "m-1",
        "note": "a\nb",
    }


def test_the_level_holds_for_loggers_in_use_and_can_be_changed(stream: io.StringIO) -> None:
    log = structlog.get_logger()
    library = logging.getLogger("some.library")
    for level, told in (("info", 0), ("debug", 2), ("error", 2), ("warning", 2)):
        logs.set_level(level)
        assert logs.get_level() == level
        log.debug("one")
        library.debug("two")
        assert len(lines(stream)) == told
    log.warning("three")
    log.fatal("four")
    library.critical("five")
    assert [line["level"] for line in lines(stream)[2:]] == ["warning", "critical", "critical"]


def test_a_level_that_is_none_is_refused_and_changes_nothing(stream: io.StringIO) -> None:
    with pytest.raises(ValueError, match="debug, info, warning"):
        logs.set_level("loud")
    assert logs.get_level() == "info"


def test_what_the_standard_library_logs_is_a_redacted_line_too(stream: io.StringIO) -> None:
    logging.getLogger("some.library").warning("refused %s for %d", f"key={KEY}", int(VISA))
    (line,) = lines(stream)
    assert line["event"] == "refused key=[redacted] for [redacted]"
    assert (line["level"], line["logger"]) == ("warning", "some.library")


def test_a_record_that_cannot_be_formatted_does_not_print_its_arguments(
    stream: io.StringIO, capsys: pytest.CaptureFixture[str]
) -> None:
    class Broken:
        def __str__(self) -> str:
            raise RuntimeError(VISA)

    # Handed to our handler alone, because pytest's own one raises what it cannot format.
    (ours,) = [h for h in logging.getLogger().handlers if isinstance(h, logs._Handler)]
    for message, args in (("%d and %d", (VISA,)), ("%s", (Broken(),))):
        ours.handle(
            logging.LogRecord("some.library", logging.ERROR, "x.py", 1, message, args, None)
        )
    assert [line["event"] for line in lines(stream)] == ["log_record_unreadable"] * 2
    assert VISA not in "".join(capsys.readouterr())


def refuse() -> None:
    raise ValueError(f"no such card {VISA}")


def failing() -> None:
    try:
        refuse()
    except ValueError as error:
        raise RuntimeError(f"key={KEY}") from error


def test_tracebacks_pass_the_redactor_whoever_logs_them(stream: io.StringIO) -> None:
    try:
        failing()
    except RuntimeError as error:
        structlog.get_logger().exception("request_failed", error=error)
        structlog.get_logger().error("request_failed", exc_info=error, stack_info=True)
        logging.getLogger("some.library").exception("failed")
    assert VISA not in stream.getvalue()
    assert KEY not in stream.getvalue()
    for line in lines(stream):
        trace = str(line["exception"])
        assert "ValueError: no such card [redacted]" in trace
        assert "RuntimeError: key=[redacted]" in trace
        assert "in failing" in trace


def test_what_nobody_catches_is_logged_and_not_printed(
    stream: io.StringIO, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        failing()
    except RuntimeError as error:
        sys.excepthook(type(error), error, error.__traceback__)
    (line,) = lines(stream)
    assert (line["event"], line["level"]) == ("uncaught_exception", "critical")
    assert VISA not in stream.getvalue() + "".join(capsys.readouterr())


def test_text_that_has_no_utf8_is_still_a_line(stream: io.StringIO) -> None:
    structlog.get_logger().info("file_seen", name="\udcff", size=2**70)
    (line,) = lines(stream)
    assert (line["name"], line["size"]) == ("\udcff", str(2**70))


@hypothesis_settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    event=st.text(max_size=20),
    values=st.dictionaries(
        st.text(min_size=1, max_size=10).filter(lambda name: name != "event"),
        st.recursive(
            st.one_of(
                st.just(VISA), st.just(int(VISA)), st.binary(max_size=9), st.text(max_size=9)
            ),
            lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.just(VISA), inner),
            max_leaves=5,
        ),
        max_size=4,
    ),
)
def test_no_log_call_raises_or_shows_a_card_number(
    stream: io.StringIO, event: str, values: dict[str, object]
) -> None:
    stream.seek(0)
    stream.truncate()
    reserved = {"exc_info", "stack_info", "level", "time"}
    structlog.get_logger().info(
        event + VISA, **{name: value for name, value in values.items() if name not in reserved}
    )
    assert stream.getvalue().count("\n") == 1
    assert VISA not in stream.getvalue()
    assert isinstance(json.loads(stream.getvalue()), dict)


def test_what_is_bound_to_a_logger_stands_in_its_lines_alone(stream: io.StringIO) -> None:
    structlog.get_logger().bind(room="ledger").warn("one", room_no=1)
    structlog.get_logger().info("two")
    one, two = lines(stream)
    assert (one["room"], one["room_no"], one["level"]) == ("ledger", 1, "warning")
    assert "room" not in two


TEXTS = st.sampled_from(
    [VISA, KEY, f"key={KEY}", "GET", "/api/credits", "abcdef" * 6, "a" * 64, "a" * 65]
) | st.text(max_size=70)
NAMES = st.sampled_from(["note", "key", "api_key", "pan", "secret", "request_id", VISA])


@given(
    events=st.lists(
        st.dictionaries(
            NAMES,
            TEXTS
            | st.integers()
            | st.floats()
            | st.booleans()
            | st.none()
            | st.binary(max_size=9)
            | st.lists(TEXTS, max_size=2),
            max_size=5,
        ),
        max_size=8,
    )
)
def test_what_is_remembered_as_clean_changes_no_line(events: list[dict[str, object]]) -> None:
    redactor = logs._Redactor()
    for event in [*events, *events]:
        expected = {redact_text(name): redact(name, value) for name, value in event.items()}
        assert repr(redactor(None, "info", dict(event))) == repr(expected)


def test_nothing_that_had_to_be_masked_stays_in_memory() -> None:
    redactor = logs._Redactor()
    for text in (VISA, f"card {VISA}", f"key={KEY}", KEY):
        for name in ("note", "api_key", "pan", "event"):
            redactor(None, "info", {name: text})
    # A bare hex text may stand under a harmless name: there it is an id.
    assert redactor._clean == {KEY}


def test_the_memory_for_what_is_clean_is_bounded() -> None:
    redactor = logs._Redactor()
    for n in range(2 * logs.CLEAN_TEXTS + 10):
        redactor(None, "info", {"note": f"text-{n}-", f"name-{n}": n})
    redactor(None, "info", {"note": "1" + "x" * logs.CLEAN_TEXT_CHARS})
    assert len(redactor._clean) == 10
    assert len(redactor._open) == logs.CLEAN_NAMES


def test_the_time_is_utc_with_microseconds_and_goes_on(stream: io.StringIO) -> None:
    before = datetime.now(UTC)
    for _ in range(50):
        structlog.get_logger().info("x")
    times = [datetime.fromisoformat(str(line["time"])) for line in lines(stream)]
    assert [str(line["time"])[-8:-7] for line in lines(stream)] == ["."] * 50
    assert times == sorted(times)
    assert before <= times[0]
    assert times[-1] <= datetime.now(UTC)


def test_a_call_cannot_overwrite_level_and_time(stream: io.StringIO) -> None:
    structlog.get_logger().info("x", time="yesterday", level="none")
    (line,) = lines(stream)
    assert line["level"] == "info"
    assert line["time"] != "yesterday"


def test_configuring_again_moves_every_line_to_the_new_stream(stream: io.StringIO) -> None:
    second = io.StringIO()
    logs.configure("warning", "json", second)
    structlog.get_logger().info("quiet")
    structlog.get_logger().warning("one")
    logging.getLogger("some.library").warning("two")
    assert stream.getvalue() == ""
    assert [line["event"] for line in lines(second)] == ["one", "two"]


@pytest.mark.usefixtures("stream")
def test_on_a_terminal_there_is_colour_and_elsewhere_json() -> None:
    ours, theirs = pty.openpty()
    with open(theirs, "w", encoding="utf-8") as terminal, open(ours, "rb") as screen:  # noqa: PTH123
        logs.configure("info", "auto", terminal)
        structlog.get_logger().info("tapped", device_id="\x1b[2Jt-1", card=VISA)
        shown = screen.read1(4096).decode()
    assert "\x1b[" in shown
    assert "tapped" in shown
    assert "\x1b[2J" not in shown, "a stranger's escape sequence would steer the terminal"
    assert VISA not in shown


def test_the_console_without_a_terminal_has_no_colour(stream: io.StringIO, tmp_path: Path) -> None:
    logs.configure("info", "console", stream)
    try:
        failing()
    except RuntimeError:
        structlog.get_logger().exception("request_failed", path=tmp_path)
    assert "\x1b" not in stream.getvalue()
    assert "ValueError: no such card [redacted]" in stream.getvalue()
    assert "request_failed" in stream.getvalue()
