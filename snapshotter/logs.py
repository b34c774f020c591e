"""Log lines in upstream's forms, text (`time="..." level=info msg="..."`) or JSON, to a rotated file or to stdout."""

from __future__ import annotations

import json
import logging
import sys
import time

from nydusfs.levels import LEVELS
from snapshotter.errors import SettingsError, StartError
from snapshotter.rotation import RotatingFile
from snapshotter.settings import Settings

_NAMES = {"WARNING": "warning", "CRITICAL": "fatal"}
# nydusd has no fatal or panic
NYDUSD_LEVELS = {"warning": "warn", "fatal": "error", "panic": "error"}
FILE = "nydus-snapshotter.log"


class Formatter(logging.Formatter):
    """logrus's text or JSON form; the message is one line whatever it holds."""

    def __init__(self, form: str = "text") -> None:
        super().__init__()
        self._json = form == "json"

    def format(self, record: logging.LogRecord) -> str:
        seconds, fraction = divmod(int(record.created * 1e9), 10**9)
        when = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds))
        message = record.getMessage()
        if record.exc_info:
            message += "\n" + self.formatException(record.exc_info)
        level = _NAMES.get(record.levelname, record.levelname.lower())
        if self._json:
            value = {"level": level, "msg": message, "time": f"{when}.{fraction:09d}Z", "logger": record.name}
            return json.dumps(value, ensure_ascii=False)
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


class _File(_Lossy, RotatingFile):
    pass


class _Stream(_Lossy, logging.StreamHandler):  # type: ignore[type-arg]
    pass


class Buffer(logging.Handler):
    """Keeps records. `logging.handlers` has one too, and imports sockets and pickles."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)


def buffer_until_known() -> Buffer:
    """For what is logged while the settings that say where to log are still being read."""
    handler = Buffer()
    logging.getLogger().addHandler(handler)
    logging.getLogger().setLevel(logging.INFO)
    return handler


def configure(settings: Settings, buffered: Buffer) -> None:
    """To stdout alone, or to the file, with warnings on stderr as well for the journal. Raises StartError."""
    root = logging.getLogger()
    root.setLevel(LEVELS[settings.log_level])
    handlers: list[logging.Handler]
    if settings.log_to_stdout:
        handlers = [_Stream(sys.stdout)]
    else:
        handlers = [_open(settings), _Stream(sys.stderr)]
        handlers[1].setLevel(logging.WARNING)
    root.removeHandler(buffered)
    for handler in handlers:
        handler.setFormatter(Formatter(settings.log_format))
        root.addHandler(handler)
    for record in buffered.records:
        if record.levelno >= root.level:
            root.handle(record)
    buffered.records.clear()


def set_level(name: str) -> None:
    """From now on. Raises SettingsError for an unknown name."""
    if name.lower() not in LEVELS:
        raise SettingsError(f"log level {name!r}: use one of {', '.join(LEVELS)}")
    logging.getLogger().setLevel(LEVELS[name.lower()])


def level() -> str:
    """The level in force, as `set_level` takes it."""
    return _NAMES.get(name := logging.getLevelName(logging.getLogger().level), name.lower())


def _open(settings: Settings) -> logging.Handler:
    path = settings.log_dir / FILE
    try:
        settings.log_dir.mkdir(mode=0o750, parents=True, exist_ok=True)
        return _File(
            path,
            limit=settings.log_rotation_size << 20,
            backups=settings.log_rotation_backups,
            days=settings.log_rotation_age,
            local_time=settings.log_rotation_local_time,
            compress=settings.log_rotation_compress,
        )
    except OSError as error:
        raise StartError(f"log file {path}: {error.strerror} (choose with --log-dir or --log-to-stdout)") from None
