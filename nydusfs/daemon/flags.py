"""What `nydusd fuse` can be told on its command line: one table, from which the command for people is made
(`commands.py`), and a reader of well-formed lines for the start of a daemon, which needs no more.

click is 25 ms of processor time and 3 MB in a process that lives as long as the daemon does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

LOG_LEVELS = ("trace", "debug", "info", "warn", "error")


class Flag(NamedTuple):
    """`kind`: str, int (from `low` to `high`), bool (a switch; its second name, if it has one, means no) or the values
    that it can have."""

    key: str
    names: tuple[str, ...]
    help: str
    kind: type | tuple[str, ...] = str
    default: Any = None
    metavar: str | None = None
    low: int = 0
    high: int | None = None


FLAGS = (
    Flag("mountpoint", ("-M", "--mountpoint"), "Where to mount. The directory must exist.", metavar="DIR"),
    Flag("apisock", ("-A", "--apisock"), "Unix socket of the HTTP API. Without it there is no API.", metavar="PATH"),
    Flag("bootstrap", ("-B", "--bootstrap"), "RAFS metadata of the image. Without it: start empty.", metavar="FILE"),
    Flag("config", ("-C", "--config"), "Configuration: version 1 JSON, or version 2 TOML or JSON.", metavar="FILE"),
    Flag("localfs_dir", ("-D", "--localfs-dir"), "Directory of the blobs; instead of --config.", metavar="DIR"),
    Flag(
        "virtual_mountpoint",
        ("-m", "--virtual-mountpoint"),
        "Where inside the mount the image appears.",
        default="/",
        metavar="PATH",
    ),
    Flag(
        "prefetch_files", ("--prefetch-files",), "List of absolute paths to fetch first, one per line.", metavar="FILE"
    ),
    Flag(
        "threads",
        ("-T", "--fuse-threads", "--thread-num"),
        "Threads that take requests; reads that wait for the network keep none.",
        int,
        4,
        low=1,
        high=1024,
    ),
    Flag(
        "fs_driver",
        ("--fs-driver",),
        "How images reach the kernel. erofs: it serves them itself from the cache (Linux 6.15); auto: where that is "
        "possible.",
        ("auto", "fuse", "erofs"),
        "fuse",
    ),
    Flag(
        "failover_policy",
        ("--failover-policy",),
        "Accepted for compatibility: what a dead worker left unanswered the next one answers.",
        ("none", "resend", "flush"),
        "resend",
    ),
    Flag("daemon_id", ("-I", "--id"), "Name of this daemon in its API answers.", metavar="ID"),
    Flag(
        "supervisor",
        ("-S", "--supervisor"),
        "Socket to give the mount to and take it from; needs --id.",
        metavar="PATH",
    ),
    Flag("upgrade", ("--upgrade",), "Do not mount: wait for the API to say what to take over.", bool, False),
    Flag(
        "keeper",
        ("--keeper", "--no-keeper"),
        "Serve from a worker process that is replaced, under the mount, when it dies.",
        bool,
        True,
    ),
    Flag("log_level", ("-l", "--log-level"), "", LOG_LEVELS, "info"),
    Flag(
        "log_file",
        ("-L", "--log-file"),
        "Log here and not to stdout; '.log' is added to a bare name.",
        metavar="PATH",
    ),
    Flag(
        "log_format",
        ("--log-format",),
        "text: as upstream's nydusd writes; json: one object a line.",
        ("text", "json"),
        "text",
    ),
    Flag(
        "log_rotation_size",
        ("--log-rotation-size",),
        "Rotate the log at this size, keep 10 compressed files. 0: never.",
        int,
        0,
        "MB",
    ),
    Flag(
        "rlimit_nofile",
        ("-R", "--rlimit-nofile"),
        "Open files to allow; clamped to what the machine permits. 0: leave it.",
        int,
        1_000_000,
    ),
)
_BY_NAME = {name: flag for flag in FLAGS for name in flag.names}


def read(words: Sequence[str]) -> dict[str, Any] | None:
    """The settings of a line on which every word is as documented; None for any other: `commands` says what is wrong
    with it, or that it is fine."""
    found = {flag.key: flag.default for flag in FLAGS}
    left = iter(words[1:] if words[:1] == ["fuse"] else words)
    for word in left:
        name, equals, value = word.partition("=") if word.startswith("--") else (word, "", "")
        flag = _BY_NAME.get(name)
        if flag is None or (equals and flag.kind is bool):
            return None
        if flag.kind is bool:
            found[flag.key] = name == flag.names[0]
            continue
        if not equals:
            value = next(left, "-")
        if value.startswith("-"):
            return None
        if flag.kind is int:
            if not (value.isascii() and value.isdecimal() and flag.low <= int(value) <= (flag.high or int(value))):
                return None
            found[flag.key] = int(value)
        elif flag.kind is not str and value not in flag.kind:  # type: ignore[operator]
            return None
        else:
            found[flag.key] = value
    return found if found["mountpoint"] is not None and conflict(found) is None else None


def conflict(settings: dict[str, Any]) -> str | None:
    """Why these settings cannot be had together."""
    if settings["config"] and settings["localfs_dir"]:
        return "the argument '--config <FILE>' cannot be used with '--localfs-dir <DIR>'"
    if settings["prefetch_files"] and not settings["bootstrap"]:
        return "--prefetch-files needs --bootstrap"
    if settings["supervisor"] and not settings["daemon_id"]:
        return "--supervisor needs --id"
    return None
