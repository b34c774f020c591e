"""Log lines in upstream's form (`time="..." level=info msg="..."`), to a rotated file or to stdout."""

from __future__ import annotations

import json
import logging
import logging.handlers
import sys
import time

from snapshotter.errors import StartError
from snapshotter.settings import Settings

_LEVELS = {
    "trace": logging.DEBUG,
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warn": logging.WARNING,
    "warning": logging.WARNING,
    "error": logging.ERROR,
    "fatal": logging.CRITICAL,
    "panic": logging.CRITICAL,
}
_NAMES = {"WARNING": "warning", "CRITICAL": "fatal"}
FILE = "nydus-snapshotter.log"


class Formatter(logging.Formatter):
    """logrus's text form; the message is one line whatever it holds."""

    def format(self, record: logging.LogRecord) -> str:
        seconds, fraction = divmod(int(record.created * 1e9), 10**9)
        when = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds))
        message = record.getMessage()
        if record.exc_info:
            message += "\n" + self.formatException(record.exc_info)
        level = _NAMES.get(record.levelname, record.levelname.lower())
        return f'time="{when}.{fraction:09d}Z" level={level} msg={json.dumps(message, ensure_ascii=False)}'


class _Lossy:
    """A log that cannot be written loses lines: said once on stderr, never by a traceback and never by a stop."""

    said = False

    def handleError(self, record: logging.LogRecord) -> None:
        error = sys.exc_info()[1]
        if isinstance(error, OSError) and not _Lossy.said:
            _Lossy.said = True
            where = getattr(self, "baseFilename", "stdout or stderr")
            try:
                sys.stderr.write(f"containerd-nydus-grpc: log {where}: {error.strerror}; lines are lost\n")
            except OSError:
                pass


class _File(_Lossy, logging.handlers.RotatingFileHandler):
    pass


class _Stream(_Lossy, logging.StreamHandler):  # type: ignore[type-arg]
    pass


def buffer_until_known() -> logging.handlers.MemoryHandler:
    """Keeps what is logged while the settings that say where to log are still being read."""
    handler = logging.handlers.MemoryHandler(10_000, flushLevel=logging.CRITICAL + 1)
    logging.getLogger().addHandler(handler)
    logging.getLogger().setLevel(logging.INFO)
    return handler


def configure(settings: Settings, buffered: logging.handlers.MemoryHandler) -> None:
    """To stdout alone, or to the file, with warnings on stderr as well for the journal. Raises StartError."""
    root = logging.getLogger()
    root.setLevel(_LEVELS[settings.log_level])
    handlers: list[logging.Handler]
    if settings.log_to_stdout:
        handlers = [_Stream(sys.stdout)]
    else:
        handlers = [_open(settings), _Stream(sys.stderr)]
        handlers[1].setLevel(logging.WARNING)
    root.removeHandler(buffered)
    for handler in handlers:
        handler.setFormatter(Formatter())
        root.addHandler(handler)
    for record in buffered.buffer:
        if record.levelno >= root.level:
            root.handle(record)
    buffered.buffer.clear()


def _open(settings: Settings) -> logging.Handler:
    path = settings.log_dir / FILE
    try:
        settings.log_dir.mkdir(mode=0o755, parents=True, exist_ok=True)
        return _File(
            path,
            maxBytes=settings.log_rotation_size << 20,
            backupCount=settings.log_rotation_backups,
            encoding="utf-8",
        )
    except OSError as error:
        raise StartError(f"log file {path}: {error.strerror} (choose with --log-dir or --log-to-stdout)") from None
