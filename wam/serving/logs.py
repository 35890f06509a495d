"""Logs that people read and programs too: an event has a name and fields, and is one line either way.

    12:00:01 plan session=arm-1 ms=41.2          --log text
    {"time": ..., "event": "plan", ...}          --log json
"""

from __future__ import annotations

import json
import logging
import time
from typing import Any


def event(log: logging.Logger, name: str, level: int = logging.INFO, **fields: Any) -> None:
    """Log an event.  Text in fields is cut short, since clients may have chosen it."""
    if log.isEnabledFor(level):
        cut = {key: value[:80] if isinstance(value, str) else value for key, value in fields.items()}
        log.log(level, "%s", name + "".join(f" {key}={json.dumps(value, default=str)}" for key, value in cut.items()), extra={"event": name, "fields": cut})


class JsonFormatter(logging.Formatter):
    """One JSON object a line."""

    def format(self, record: logging.LogRecord) -> str:
        """The record, its event's fields beside its time, level and logger."""
        name = getattr(record, "event", None)
        line: dict[str, Any] = {"time": round(record.created, 3), "level": record.levelname.lower(), "logger": record.name, "event": name or "message"}
        line |= getattr(record, "fields", {}) if name else {"message": record.getMessage()}
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


class TextFormatter(logging.Formatter):
    """The time of day, then the message."""

    def format(self, record: logging.LogRecord) -> str:
        """One line, and the traceback where there is one."""
        line = f"{time.strftime('%H:%M:%S', time.localtime(record.created))} {record.getMessage()}"
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


def set_up(form: str) -> None:
    """Log the package's events to stderr, as `text` or `json`."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter() if form == "json" else TextFormatter())
    root = logging.getLogger("wam")
    root.handlers, root.propagate = [handler], False
    root.setLevel(logging.INFO)
