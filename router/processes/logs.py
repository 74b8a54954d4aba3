"""How every process of the server writes its log: one line per event, as text or as JSON.

Owns the form of the lines and what no line may contain: control characters are escaped, and an
unexpected exception is logged with its type and place only, because its message may quote a
request. Knows nothing of requests except the id of a line's request.
"""

from __future__ import annotations

import io
import logging
import re
import sys
import threading
import time
import traceback
from collections.abc import Mapping
from contextvars import ContextVar
from types import TracebackType
from typing import Any, Literal

import msgspec

from .log_stream import LogStream

LogLevel = Literal["debug", "info", "warning", "error"]
LogFormat = Literal["text", "json"]

# The id of the request that the running task works for.
request_id_of_task: ContextVar[str | None] = ContextVar("request_id_of_task", default=None)

MAX_FRAMES = 12
# A full disk or a slow reader of stderr loses lines, and nothing else.
STREAM = LogStream()
# Libraries whose messages quote URLs, addresses and content from clients.
TALKATIVE = frozenset({"sanic", "asyncio", "httpcore2", "httpx2", "PIL"})
# Characters that start a line, control a terminal, change text direction or cannot be encoded.
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def set_up_logging(level: LogLevel, form: LogFormat, process: str) -> None:
    """Write this process's log to stderr from now on. process: its name in every line."""
    handler = LogHandler(STREAM)
    handler.setFormatter(EventFormatter(form, process, shows_all=level == "debug"))
    root = logging.getLogger()
    for old in list(root.handlers):
        root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(level.upper())
    logging.captureWarnings(True)
    sys.excepthook = _log_uncaught
    threading.excepthook = _log_uncaught_of_thread
    if form == "json":
        sys.stderr = StrayLines()
    elif sys.stderr is sys.__stderr__:
        sys.stderr = STREAM
    if level != "debug":
        # Sanic logs every start, every stop and every cancelled request.
        logging.getLogger("sanic").setLevel(logging.WARNING)


def say(line: str, level: int = logging.INFO) -> None:
    """Write one line for the operator: as it is, or as an event if the log is JSON."""
    for handler in logging.getLogger().handlers:
        if isinstance(handler.formatter, EventFormatter) and handler.formatter.form == "json":
            # Whatever the level: the operator always wants these few lines.
            record = logging.LogRecord("vlmserve", level, "", 0, escaped(line), None, None)
            handler.handle(record)
            return
    sys.stderr.write(f"{line}\n")
    report_lost_lines()


def report_lost_lines() -> None:
    """Log how many lines were lost, once lines can be written again."""
    if lost := STREAM.take_num_lost():
        logging.getLogger("vlmserve.log").warning("%d lines of this log were lost", lost)


class LogHandler(logging.StreamHandler[LogStream]):
    """Writes each record, and then how many lines were lost before it."""

    def emit(self, record: logging.LogRecord) -> None:
        super().emit(record)
        report_lost_lines()


class StrayLines(io.TextIOBase):
    """A stderr whose lines become log events, for code that writes to stderr directly."""

    def __init__(self) -> None:
        self._partial_line = ""

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return 2

    def write(self, text: str) -> int:
        *lines, self._partial_line = (self._partial_line + text).split("\n")
        for line in lines:
            if line.strip():
                logging.getLogger("vlmserve.stderr").info("%s", line.rstrip())
        return len(text)


def _log_uncaught(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    logging.getLogger("vlmserve").critical("the process ends", exc_info=error)


def _log_uncaught_of_thread(args: threading.ExceptHookArgs) -> None:
    logging.getLogger("vlmserve").critical("a thread ends", exc_info=args.exc_value)


def escaped(text: str) -> str:
    """The text in one line, without characters that control a terminal."""
    return _UNPRINTABLE.sub(lambda match: _escape(match[0]), text)


def place_of(error: BaseException) -> list[str]:
    """Where an exception was raised, innermost first: modules, lines, functions; no paths."""
    return [
        f"{frame.f_globals.get('__name__', '?')}:{line} {frame.f_code.co_name}"
        for frame, line in reversed(list(traceback.walk_tb(error.__traceback__)))
    ][:MAX_FRAMES]


class EventFormatter(logging.Formatter):
    """Formats a record, with the fields of its `fields` attribute, as one line.

    shows_all: also log messages of unexpected exceptions and of TALKATIVE libraries.
    """

    def __init__(self, form: LogFormat, process: str, *, shows_all: bool = False) -> None:
        super().__init__()
        self.form = form
        self._process = process
        self._shows_all = shows_all

    def format(self, record: logging.LogRecord) -> str:
        event = self._event(record)
        return _as_json(event) if self.form == "json" else _as_text(event)

    def _event(self, record: logging.LogRecord) -> dict[str, Any]:
        event: dict[str, Any] = {
            "time": _timestamp(record.created),
            "level": record.levelname.lower(),
            "process": self._process,
            "logger": record.name,
            "message": self._message(record),
        }
        if (request_id := request_id_of_task.get()) is not None:
            event["request_id"] = request_id
        fields: Mapping[str, Any] = getattr(record, "fields", {})
        event |= fields
        error = record.exc_info[1] if record.exc_info else None
        if error is not None:
            event["exception"] = self._exception(error)
        return event

    def _message(self, record: logging.LogRecord) -> str:
        if record.name.split(".")[0] in TALKATIVE and not self._shows_all:
            return f"{record.levelname.lower()} in {record.module}:{record.lineno}"
        return record.getMessage()

    def _exception(self, error: BaseException) -> dict[str, Any]:
        fields: dict[str, Any] = {"type": type(error).__name__, "at": place_of(error)}
        if self._shows_all:
            fields["message"] = str(error)[:2000]
        cause = error.__cause__ or error.__context__
        if cause is not None:
            fields["cause"] = type(cause).__name__
        return fields


def _as_json(event: Mapping[str, Any]) -> str:
    return msgspec.json.encode(_escaped_deep(event)).decode()


def _as_text(event: Mapping[str, Any]) -> str:
    head = ("time", "level", "process", "logger", "message")
    line = "{time} {level} {process} {logger}: {message}".format(**event)
    rest = {name: value for name, value in event.items() if name not in head}
    for name, value in rest.items():
        if value is None:
            continue
        shown = value if isinstance(value, str) else msgspec.json.encode(value).decode()
        line += f" {name}={shown}"
    return escaped(line)


def _escaped_deep(value: Any) -> Any:
    if isinstance(value, str):
        return escaped(value)
    if isinstance(value, Mapping):
        return {name: _escaped_deep(inner) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_escaped_deep(inner) for inner in value]
    return value


def _escape(char: str) -> str:
    code = ord(char)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


def _timestamp(seconds: float) -> str:
    whole = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds))
    return f"{whole}.{int(seconds % 1 * 1000):03d}Z"
