"""What a start of nydusd costs: a command line read without click, and no import that it does not need."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import click
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nydusfs.daemon import commands, flags

NAMES = [name for flag in flags.FLAGS for name in flag.names]
VALUES = ["/a", "4", "0", "-1", "2000", "fuse", "erofs", "INFO", "info", "json", "resend", "", "--upgrade", "a=b"]
WORD = st.one_of(
    st.sampled_from(NAMES),
    st.sampled_from(VALUES),
    st.builds("{}={}".format, st.sampled_from(NAMES), st.sampled_from(VALUES)),
    st.sampled_from(["-M/a", "--help", "--version", "--unknown", "--writable", "--", "-", "fuse", "singleton"]),
)


def by_click(words: list[str]) -> dict[str, Any] | None:
    """None for a line that is refused, or asks for something else than a start."""
    seen: list[dict[str, Any]] = []

    def callback(shared_dir: object, writable: object, dedup_db: object, **settings: Any) -> None:
        if flags.conflict(settings) is None:
            seen.append(settings)

    group = commands.cli
    assert isinstance(group, click.Group)
    command = group.commands["fuse"]
    before, command.callback = command.callback, callback
    try:
        group.main(words, prog_name="nydusd", standalone_mode=False)
    except (click.ClickException, click.exceptions.Exit):
        return None
    finally:
        command.callback = before
    return seen[0] if seen else None


@given(st.lists(WORD, max_size=6), st.booleans(), st.booleans())
def test_a_line_that_is_read_quickly_means_what_click_says(words: list[str], command: bool, mount: bool) -> None:
    words = (["fuse"] if command else []) + (["-M", "/m"] if mount else []) + words
    quickly = flags.read(words)
    if quickly is not None:
        assert quickly == by_click(words)


@pytest.mark.parametrize(
    "words",
    [
        ["-M", "/m"],
        ["fuse", "--thread-num", "8", "--id", "x", "--supervisor", "/s", "--mountpoint", "/m", "--apisock", "/a",
         "--log-level", "info", "--log-rotation-size", "100", "--log-file", "/l", "--failover-policy", "resend",
         "--upgrade"],
        ["fuse", "--no-keeper", "--config=/c", "-B", "/b", "-M", "/m", "--fs-driver", "auto"],
        ["-M", "/m", "-A", "/a", "-T", "8", "-I", "x", "-S", "/s", "-R", "0"],  # nydus 2.1
    ],
)  # fmt: skip
def test_lines_of_programs_are_read_quickly(words: list[str]) -> None:
    assert flags.read(words) == by_click(words) is not None


def in_a_process(code: str) -> Any:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    return json.loads(done.stdout)


def test_a_start_imports_no_more_than_it_needs() -> None:
    keeper = in_a_process(
        "import json, sys\nfrom nydusfs.daemon import cli\nfrom nydusfs.keeper import keeper\n"
        "print(json.dumps([*sys.modules]))"
    )
    assert not {"click", "trio", "dataclasses", "nydusfs.services"} & set(keeper)
    assert not [name for name in keeper if name.startswith(("bootstrap", "nydusfs.cache", "nydusfs.http", "zstandard"))]
    zygote = in_a_process(
        "import json, sys\nfrom nydusfs.keeper import zygote\nzygote.load()\nprint(json.dumps([*sys.modules]))"
    )
    assert {"nydusfs.daemon.worker", "nydusfs.sources.registrysource", "bootstrap.reader_v6"} <= set(zygote)
    unwanted = {"click", "numpy", "httpx", "cryptography", "asyncio", "tomllib", "nydusfs.objects", "trio._dtls"}
    assert not unwanted & set(zygote)


@pytest.mark.parametrize("name", ["singleton", "virtiofs", "nbd", "uffd"])
def test_what_is_not_here_names_what_is(name: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "nydusfs.daemon.cli", name, "--fscache", "/x"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert f"the subcommand '{name}' is not supported by this nydusd" in done.stderr
    assert "'fuse'" in done.stderr or "nydus-image export --block" in done.stderr


TRIO = """
import json, sys
from nydusfs import lean
{before}
lean.import_trio()
import trio
ran = trio.run(trio.to_thread.run_sync, lambda: 7)
lacks = "trio._dtls" not in sys.modules
print(json.dumps([ran, lacks, trio.DTLSEndpoint.__module__, hasattr(trio, "nothing")]))
"""


@pytest.mark.parametrize(
    ("before", "lacks"),
    [
        ("", True),
        ("def fail(_):\n    raise AttributeError\nlean._complete = fail", False),
        ("lean._NAMES = ()", False),  # of a trio that wants other names of that module
        ("lean._THREADS = 'libnowhere.so'", True),  # as with a C library of another kind
    ],
)
def test_trio_is_whole_however_it_was_imported(before: str, lacks: bool) -> None:
    assert in_a_process(TRIO.format(before=before))[:2] == [7, lacks]
    if "_NAMES" not in before:
        assert in_a_process(TRIO.format(before=before))[2:] == ["trio._dtls" if lacks else "trio", False]
