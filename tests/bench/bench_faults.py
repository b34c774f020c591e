"""What the reader of a container sees of each fault, and what an operator sees: `python -m tests.bench.bench_faults`.

One fresh nydusd per fault, one mirror before a registry. A file is read that is not cached; its time, its bytes or its
error, the warnings in the log, the state of both sources and what `metrics` counted are printed. docs/operations.md was
written from this.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.lab.daemon import Nydusd
from tests.lab.faulty import FaultyServer, dead_port, faulty_server
from tests.lab.process import remove_tree, unmount_below, wait_until, work_dir
from tests.lab.tiny import TinyImage, noise, tiny_image

FILES = {f"f{number:02}": noise(1_300_000, number) for number in range(24)}
READER = """
import sys, hashlib, time
t = time.monotonic()
try:
    data = open(sys.argv[1], "rb").read()
    said = hashlib.sha256(data).hexdigest()
except OSError as error:
    said = error.strerror
print(f"{time.monotonic() - t:.3f} {said}")
"""


@dataclass
class Bench:
    image: TinyImage
    daemon: Nydusd
    origin: FaultyServer
    mirror: FaultyServer
    work: Path
    said: int = 0

    def reading(self, name: str) -> subprocess.Popen[str]:
        path = self.daemon.mnt / "i" / name
        return subprocess.Popen([sys.executable, "-c", READER, str(path)], stdout=subprocess.PIPE, text=True)

    def result(self, reader: subprocess.Popen[str], name: str) -> str:
        import hashlib

        out, _ = reader.communicate(timeout=600)
        seconds, _, said = out.strip().partition(" ")
        right = hashlib.sha256(FILES[name]).hexdigest()
        verdict = "right bytes" if said == right else "WRONG BYTES" if len(said) == 64 else said
        return f"{float(seconds):6.2f} s  {verdict}"

    def read(self, name: str) -> str:
        return self.result(self.reading(name), name)

    def lines(self) -> list[str]:
        """WARN and ERROR since the last call, without the time."""
        text = self.daemon.log_text()
        new, self.said = text[self.said :], len(text)
        return [line.partition("] ")[2][:230] for line in new.splitlines() if "] WARN" in line or "] ERROR" in line]


@contextmanager
def bench(**config: Any) -> Iterator[Bench]:
    work = work_dir()
    try:
        image = tiny_image(work, FILES)
        blobs = {image.blob_id: image.blob}
        with faulty_server(blobs) as origin, faulty_server(blobs) as mirror, Nydusd() as daemon:
            text = configuration(work, origin.netloc, mirror.url, **config)
            assert daemon.mount("/i", image.bootstrap, text).status == 204
            yield Bench(image, daemon, origin, mirror, work)
    finally:
        unmount_below(work)
        remove_tree(work)


def configuration(work: Path, origin: str, mirror: str, **cache: Any) -> str:
    """The times of examples/config.json."""
    backend = {
        "host": origin, "repo": "a/b", "scheme": "http", "timeout": 10, "connect_timeout": 10, "retry_limit": 2,
        "mirrors": [{"host": mirror}],
    }  # fmt: skip
    device = {
        "backend": {"type": "registry", "config": backend},
        "cache": {"type": "blobcache", "config": {"work_dir": str(work / "cache"), **cache}},
    }
    return json.dumps({"device": device, "mode": "direct", "fs_prefetch": {"enable": False}})


def reads_under(change: Callable[[Bench], None], *, reads: int = 8) -> None:
    with bench() as one:
        print("    before     ", one.read("f00"))
        one.lines()
        change(one)
        for number in range(1, 1 + reads):
            print(f"    read {number:2}    ", one.read(f"f{number:02}"))
        print("    cached     ", one.read("f00"))
        report(one)
        if change is not dead_both:
            one.origin.mode = one.mirror.mode = "ok"
            one.origin.latency, one.origin.choose = 0.0, None
            print("    mended     ", one.read("f20"))


def report(one: Bench) -> None:
    lines = one.lines()
    for line in lines[:6]:
        print("    log        ", line)
    if len(lines) > 6:
        print(f"    log         and {len(lines) - 6} more")
    for source in one.daemon.get("metrics/sources").body:
        which = "mirror " if str(one.mirror.port) in source["address"] else "registry"
        print(f"    {which:<11} {source['state']}, {source['requests']} requests, {source['failures']} failed, "
              f"{100 * source['error_rate']:.1f} % errors, last failure: {source['last_failure']}")  # fmt: skip
    stats = one.daemon.get("metrics?id=/i").body
    events = one.daemon.get("daemon/events").body
    reads, failed = stats["fop_hits"][4], stats["fop_errors"][4]
    print(f"    counted     {reads} reads, {failed} failed; {events['total_errors']} events")


def set_modes(mirror: str = "ok", origin: str = "ok") -> Callable[[Bench], None]:
    def change(one: Bench) -> None:
        one.mirror.mode, one.origin.mode = mirror, origin

    return change


def late(one: Bench) -> None:
    one.mirror.mode, one.origin.latency = "hang-headers", 15.0


def busy(one: Bench) -> None:
    until = time.monotonic() + 10
    one.mirror.mode, one.origin.choose = "503", lambda request: "503" if time.monotonic() < until else "ok"


def dead_mirror(one: Bench) -> None:
    one.mirror.close()


def dead_both(one: Bench) -> None:
    one.mirror.close()
    one.origin.close()


@contextmanager
def black_hole() -> Iterator[str]:
    """host:port to which a connection is never made: the kernel drops packets for a listener whose queue is full."""
    with ExitStack() as exits:
        listener = exits.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0))
        for _ in range(4):
            waiting = exits.enter_context(socket.socket())
            waiting.setblocking(False)
            with suppress(BlockingIOError):
                waiting.connect(listener.getsockname())
        time.sleep(0.2)
        host, port = listener.getsockname()
        yield f"{host}:{port}"


@contextmanager
def silence() -> Iterator[str]:
    """host:port that takes connections and requests, and never answers."""
    with socket.create_server(("127.0.0.1", 0), backlog=64) as listener:
        host, port = listener.getsockname()
        yield f"{host}:{port}"


def from_the_start(mirror: Callable[[], AbstractContextManager[str]]) -> None:
    """Three daemons that never met this mirror otherwise; the registry answers after 20 ms."""
    work = work_dir()
    try:
        image = tiny_image(work, FILES)
        for _ in range(3):
            blobs = {image.blob_id: image.blob}
            with faulty_server(blobs, latency=0.02) as origin, mirror() as address, Nydusd() as daemon:
                text = configuration(daemon.dir, origin.netloc, f"http://{address}")
                assert daemon.mount("/i", image.bootstrap, text).status == 204
                one = Bench(image, daemon, origin, origin, work)
                print("    reads      ", *[one.read(f"f{number:02}") for number in range(3)])
                for line in one.lines():
                    print("    log        ", line)
    finally:
        remove_tree(work)


def killed(which: str) -> None:
    with bench() as one:
        one.mirror.latency = one.origin.latency = 0.5
        print("    before     ", one.read("f00"))
        one.lines()
        reader = one.reading("f01")
        time.sleep(0.4)
        if which == "all":
            one.daemon.kill_all()
        else:
            os.kill(int(one.daemon.get("daemon").body[f"{which}_pid"]), signal.SIGKILL)
        print("    in flight  ", one.result(reader, "f01"))
        if which == "all":
            print("    page cache ", one.read("f00"))
            print("    the rest   ", one.read("f02"))
            return
        print("    afterwards ", one.read("f02"))
        wait_until(one.daemon.running, 20, "the API")
        report(one)


def disk_full() -> None:
    with bench() as one:
        cache = one.work / "cache"
        one.daemon.umount("/i")
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", cache], check=True)
        text = configuration(one.work, one.origin.netloc, one.mirror.url)
        assert one.daemon.mount("/i", one.image.bootstrap, text).status == 204
        one.lines()
        for number in range(8):
            print(f"    read {number + 1:2}    ", one.read(f"f{number:02}"))
        print("    again      ", one.read("f07"))
        report(one)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="FAULT", help="all when none is named")
    wanted = parser.parse_args().names
    faults: dict[str, Callable[[], None]] = {
        "dead mirror": lambda: reads_under(dead_mirror),
        "dead mirror from the start": lambda: from_the_start(dead_port),
        "mirror whose packets are lost, from the start": lambda: from_the_start(black_hole),
        "silent mirror from the start": lambda: from_the_start(silence),
        "mirror refuses (503)": lambda: reads_under(set_modes("503")),
        "hanging mirror": lambda: reads_under(set_modes("hang-headers")),
        "mirror that stops in the body": lambda: reads_under(set_modes("hang-body")),
        "wrong bytes from the mirror": lambda: reads_under(set_modes("wrong-bytes")),
        "wrong bytes from all": lambda: reads_under(set_modes("wrong-bytes", "wrong-bytes"), reads=3),
        "registry and mirror down": lambda: reads_under(dead_both, reads=3),
        "registry and mirror hang": lambda: reads_under(set_modes("hang-headers", "hang-headers"), reads=2),
        "registry takes 15 s": lambda: reads_under(late, reads=2),
        "registry busy for 10 s": lambda: reads_under(busy, reads=2),
        "blob gone (404)": lambda: reads_under(set_modes("404", "404"), reads=3),
        "disk full": disk_full,
        "worker killed": lambda: killed("worker"),
        "keeper killed": lambda: killed("keeper"),
        "all of nydusd killed": lambda: killed("all"),
    }
    for name, run in faults.items():
        if not wanted or name in wanted:
            print(f"{name}", flush=True)
            run()


if __name__ == "__main__":
    main()
