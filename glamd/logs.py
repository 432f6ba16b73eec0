"""How the process logs: one JSON object a line through structlog, or colour for a person.

Set up once by the composition root. Rooms take `structlog.get_logger()` and never import this.
The standard library's logging goes the same way, so that a library's line passes the redactor too,
as does every traceback. Which events there are is for who logs them to say.
"""

import json
import logging
import sys
import time
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from types import TracebackType
from typing import Final, Literal, TextIO, cast

import orjson
import structlog
from structlog.typing import EventDict, Processor, WrappedLogger

from glamd.redaction import redact, redact_text

Style = Literal["json", "console", "auto"]

_Step = Callable[[WrappedLogger, str, EventDict], EventDict]
"""A processor as seen from the loop over all of them; the last one's result is in fact the line."""

_LEVELS = {
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warning": logging.WARNING,
    "error": logging.ERROR,
    "critical": logging.CRITICAL,
}
_LEVEL_OF_METHOD = {"warn": "warning", "exception": "error", "fatal": "critical"}
_MULTILINE = frozenset({"exception", "stack"})

CLEAN_TEXTS: Final = 4096
CLEAN_TEXT_CHARS: Final = 64
CLEAN_NAMES: Final = 1024
# A text that stands under a name as it is only where the name does not hide it.
_LIKE_A_KEY = "abcdef" * 6
_SHORT_NUMBER = 10**11
"""What is smaller has too few digits for a card number."""


class _Gate:
    """Drops what is below the level; a processor, because rooms keep their loggers for good."""

    def __init__(self) -> None:
        self.level = "info"
        self.threshold = logging.INFO

    def __call__(self, _logger: WrappedLogger, method: str, event: EventDict) -> EventDict:
        level = _LEVEL_OF_METHOD.get(method, method)
        if _LEVELS.get(level, logging.CRITICAL) < self.threshold:
            raise structlog.DropEvent
        event["level"] = level
        return event


_gate = _Gate()


def configure(
    level: str,
    format: Style,  # noqa: A002  called like the setting that is handed in
    stream: TextIO,
) -> None:
    """Send all that is logged from now on to `stream`, at `level` (`debug` to `critical`).

    `auto` is `console` where the stream is a terminal, else `json`. May be called again. What
    nobody catches is logged too, instead of being printed past the redactor.
    """
    terminal = stream.isatty()
    renderer: list[Processor] = [_json]
    if format == "console" or (format == "auto" and terminal):
        # The traceback is text by then, so that it has passed the redactor.
        renderer = [
            _printable,
            structlog.dev.ConsoleRenderer(
                colors=terminal,
                timestamp_key="time",
                exception_formatter=structlog.dev.plain_traceback,
            ),
        ]
    shared: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.StackInfoRenderer(),
        structlog.processors.format_exc_info,
        _Redactor(),
        _Stamp(),
        *renderer,
    ]
    structlog.configure(
        processors=[_gate, *shared],
        wrapper_class=_Logger,
        logger_factory=structlog.WriteLoggerFactory(stream),
        cache_logger_on_first_use=True,
    )
    root = logging.getLogger()
    for handler in [handler for handler in root.handlers if isinstance(handler, _Handler)]:
        root.removeHandler(handler)
    root.addHandler(_Handler(stream, shared))
    set_level(level)
    sys.excepthook = _uncaught


def set_level(level: str) -> None:
    """Log `level` and what is graver from now on, in loggers that are already in use too.

    Raises `ValueError` for a name that is no level.
    """
    if level not in _LEVELS:
        raise ValueError(f"the level should be one of {', '.join(_LEVELS)}")
    _gate.level, _gate.threshold = level, _LEVELS[level]
    logging.getLogger().setLevel(_LEVELS[level])


def get_level() -> str:
    """The level that holds now."""
    return _gate.level


class _Logger(structlog.BoundLoggerBase):
    """What rooms log through: the levels, and nothing between a call and the processors.

    structlog's own copies the fields three times on their way and can do much that nobody here
    asks for. An access line for each request makes that a tenth of a cheap request's price.
    """

    def debug(self, event: str, **fields: object) -> None:
        self._tell("debug", event, fields)

    def info(self, event: str, **fields: object) -> None:
        self._tell("info", event, fields)

    def warning(self, event: str, **fields: object) -> None:
        self._tell("warning", event, fields)

    def error(self, event: str, **fields: object) -> None:
        self._tell("error", event, fields)

    def exception(self, event: str, **fields: object) -> None:
        fields.setdefault("exc_info", True)
        self._tell("error", event, fields)

    def critical(self, event: str, **fields: object) -> None:
        self._tell("critical", event, fields)

    warn = warning
    fatal = critical

    def _tell(self, method: str, event: str, fields: dict[str, object]) -> None:
        told: EventDict = {**self._context, **fields} if self._context else fields
        told["event"] = event
        try:
            for process in cast("Iterable[_Step]", self._processors):
                told = process(self._logger, method, told)
        except structlog.DropEvent:
            return
        self._logger.msg(told)


class _Handler(logging.StreamHandler[TextIO]):
    """Takes the standard library's records through the same processors."""

    def __init__(self, stream: TextIO, processors: list[Processor]) -> None:
        super().__init__(stream)
        self._processors = processors

    def format(self, record: logging.LogRecord) -> str:
        try:
            message = record.getMessage()
        except Exception:  # noqa: BLE001  an argument's __str__ may raise anything
            # The library would print the arguments, past the redactor.
            message = "log_record_unreadable"
        event: EventDict = {
            "event": message,
            "level": record.levelname.lower(),
            "logger": record.name,
        }
        if record.exc_info:
            event["exc_info"] = record.exc_info
        for process in self._processors:
            event = cast("EventDict", process(None, record.levelname, event))
        return str(event)


class _Redactor:
    """The last line of defence, with a memory for what it need not search again.

    Most of what a line holds was in the line before: routes, kinds, names, ids. Remembered is only
    what came out as it went in, so that nothing secret stays behind here.
    """

    def __init__(self) -> None:
        self._clean: set[str] = set()
        # Whether anything but the value itself decides what stands under a name.
        self._open: dict[str, bool] = {}

    def __call__(self, _logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
        known = self._open.get
        for name, value in event.items():
            if not (known(name) or self._is_open(name)):
                return {redact_text(key): redact(key, item) for key, item in event.items()}
            kind = value.__class__
            if kind is str:
                # Every secret that has a shape has more than letters in it.
                if value in self._clean or (value.isalpha() and len(value) <= CLEAN_TEXT_CHARS):
                    continue
            elif kind is int or kind is float:
                if -_SHORT_NUMBER < value < _SHORT_NUMBER:
                    continue
            elif value is None or kind is bool:
                continue
            redacted = redact(name, value)
            if kind is str and redacted == value and len(value) <= CLEAN_TEXT_CHARS:
                self._remember(value)
            event[name] = redacted
        return event

    def _is_open(self, name: str) -> bool:
        known = self._open.get(name)
        if known is None:
            known = redact(name, _LIKE_A_KEY) == _LIKE_A_KEY and redact_text(name) == name
            if len(self._open) < CLEAN_NAMES:
                self._open[name] = known
        return known

    def _remember(self, text: str) -> None:
        if len(self._clean) >= CLEAN_TEXTS:
            self._clean.clear()
        self._clean.add(text)


class _Stamp:
    """Adds the time, of which all but the fraction is written once a second."""

    def __init__(self) -> None:
        self._written: tuple[int, str] = (-1, "")

    def __call__(self, _logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
        second, rest_ns = divmod(time.time_ns(), 1_000_000_000)
        # Read and replaced as one, since other threads log too.
        written = self._written
        if written[0] != second:
            text = datetime.fromtimestamp(second, UTC).strftime("%Y-%m-%dT%H:%M:%S.")
            written = self._written = (second, text)
        event["time"] = f"{written[1]}{rest_ns // 1000:06d}Z"
        return event


def _json(_logger: WrappedLogger, _method: str, event: EventDict) -> str:
    ordered = {"event": event.get("event"), "level": event.get("level"), "time": event.get("time")}
    ordered |= event
    try:
        return orjson.dumps(ordered).decode()
    except orjson.JSONEncodeError:
        # A lone surrogate, out of some undecodable file name, is text that UTF-8 has no bytes for.
        return json.dumps(ordered)


def _printable(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    """Control characters in what a stranger sent must not steer the operator's terminal."""
    return {
        name: value.encode("unicode_escape").decode()
        if isinstance(value, str) and not value.isprintable() and name not in _MULTILINE
        else value
        for name, value in event.items()
    }


def _uncaught(
    kind: type[BaseException], error: BaseException, traceback: TracebackType | None
) -> None:
    if issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, traceback)
        return
    structlog.get_logger().critical("uncaught_exception", exc_info=(kind, error, traceback))
