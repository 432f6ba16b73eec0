"""How the process logs: one JSON object a line through structlog, or colour for a person.

Set up once by the composition root. Rooms take `structlog.get_logger()` and never import this.
The standard library's logging goes the same way, so that a library's line passes the redactor too,
as does every traceback. Which events there are is for who logs them to say.
"""

import json
import logging
import sys
from types import TracebackType
from typing import Literal, TextIO, cast

import orjson
import structlog
from structlog.typing import EventDict, Processor, WrappedLogger

from glamd.redaction import redact, redact_text

Style = Literal["json", "console", "auto"]

_LEVELS = {
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warning": logging.WARNING,
    "error": logging.ERROR,
    "critical": logging.CRITICAL,
}
_LEVEL_OF_METHOD = {"warn": "warning", "exception": "error", "fatal": "critical"}
_MULTILINE = frozenset({"exception", "stack"})


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
        _redacted,
        structlog.processors.TimeStamper(fmt="iso", utc=True, key="time"),
        *renderer,
    ]
    structlog.configure(
        processors=[_gate, *shared],
        wrapper_class=structlog.make_filtering_bound_logger(logging.DEBUG),
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


def _redacted(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    return {redact_text(name): redact(name, value) for name, value in event.items()}


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
