"""Real Dragonfly on loopback: a scheduler, a seed peer and any number of peers, of either generation.

    with Dragonfly(work, f"http://{registry.host}", flavor="classic", peers=2) as dragonfly:
        config = daemon_config([dragonfly.mirror(0)])          # the first node's
        dragonfly.peers[1].kill(), dragonfly.scheduler.freeze()  # and so on

classic: scheduler and dfdaemon (`dfget daemon`) 2.0.9 of the first Nydus guides, with a stand-in for the manager.
modern: scheduler 2.5.1 and the dfdaemon written in Rust (client 1.5.1). Nothing of them is ours and nothing leaves
127.0.0.1. Each program has a directory and ports of its own and is ended by process id.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any

from tests.lab.paths import ref_bin
from tests.lab.process import Child, LabError, can_connect, tail

CLASSIC, MODERN = FLAVORS = ("classic", "modern")
PROGRAMS = {CLASSIC: ("dfget", "scheduler", "labmanager"), MODERN: ("dfdaemon", "scheduler-2.5.1")}
PING = {CLASSIC: "/server/ping", MODERN: "/healthy"}
# A modern daemon can exit at its start, about one in ten, right after the scheduler's port opened.
TRIES = 3


def missing(flavor: str) -> str:
    """ "" when Dragonfly of this generation can be run here, else why not."""
    absent = [name for name in PROGRAMS[flavor] if ref_bin(name) is None]
    return f"interop: {', '.join(absent)} of Dragonfly ({flavor}) not here" if absent else ""


_given: set[int] = set()


def quiet_port() -> int:
    """A free port below those that the kernel gives to outgoing connections, so that it stays free until it is used.

    Never the same twice: of a cluster's 23 two were equal once in 45 times, and a dfdaemon ended without a word.
    """
    for _ in range(200):
        port = random.randrange(20_000, 32_000)
        if port in _given:
            continue
        with socket.socket() as sock:
            try:
                sock.bind(("127.0.0.1", port))
            except OSError:
                continue
            _given.add(port)
            return port
    raise LabError("no free port below 32000")


class Program:
    """One process of Dragonfly's, to be ended, frozen and started again as its user likes."""

    def __init__(self, name: str, argv: Sequence[str | Path], log: Path, ports: Sequence[int]) -> None:
        """`ports`: all of them accept connections when it is ready."""
        self.name, self.argv, self.log, self.ports = name, argv, log, list(ports)
        self._child: Child | None = None

    @property
    def pid(self) -> int:
        if self._child is None:
            raise LabError(f"{self.name} is not running")
        return self._child.pid

    def alive(self) -> bool:
        return self._child is not None and self._child.alive()

    def prepare(self) -> None:
        """Called before each start."""

    def start(self, timeout: float = 30.0) -> None:
        """Returns when it is ready."""
        if self.alive():
            return
        self.prepare()
        # No proxy variables: it must never send a request anywhere but to loopback.
        env = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
        for left in reversed(range(TRIES)):
            self._child = Child(self.name, self.argv, self.log, env=env)
            try:
                self._child.wait_ready(lambda: all(can_connect(("127.0.0.1", port)) for port in self.ports), timeout)
                return
            except LabError as error:
                ended = not self._child.alive()
                self.kill()
                if not (ended and left):
                    raise LabError(f"{error}\n{self.last_words()}") from None
                time.sleep(1)

    def last_words(self) -> str:
        """Of the logs that it writes itself: it ends without any on its output."""
        logs = sorted(self.log.parent.glob("logs/**/*.log"), key=lambda path: path.stat().st_mtime)
        return "\n".join(f"the end of {path}:\n{tail(path, 800)}" for path in logs[-3:] if path.stat().st_size)

    def _signal(self, number: int) -> None:
        if self._child is not None and self._child.alive():
            os.kill(self._child.pid, number)

    def freeze(self) -> None:
        self._signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self._signal(signal.SIGCONT)

    def stop(self) -> None:
        if self._child is not None:
            self.thaw()
            self._child.stop(15)
            self._child = None

    def kill(self) -> None:
        if self._child is not None:
            self._child.kill()
            self._child = None


@dataclass(frozen=True, slots=True)
class Ports:
    """Of one dfdaemon. `mirror` is where nodes send their requests, as mirror and as HTTP proxy."""

    mirror: int
    health: int
    rpc: int
    upload: int
    metrics: int
    stats: int
    quic: int


class Peer(Program):
    """A dfdaemon. `dir` holds its configuration, logs and cache."""

    def __init__(
        self,
        name: str,
        flavor: str,
        directory: Path,
        argv: Sequence[str | Path],
        ports: Ports,
        configure: Callable[[Ports], object],
    ) -> None:
        """`configure` writes its configuration."""
        super().__init__(name, argv, directory / "out.log", [])
        self.flavor, self.dir, self.at, self._configure = flavor, directory, ports, configure
        self._started = False

    def prepare(self) -> None:
        """A modern dfdaemon that was killed cannot have its upload port again for a minute (TIME_WAIT)."""
        if self._started and self.flavor == MODERN:
            inner = ("rpc", "upload", "metrics", "stats", "quic")
            self.at = replace(self.at, **{name: quiet_port() for name in inner})
        self._started = True
        self._configure(self.at)
        self.ports = [self.at.mirror, self.at.health, self.at.rpc, self.at.upload]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.at.mirror}"

    @property
    def ping_url(self) -> str:
        return f"http://127.0.0.1:{self.at.health}{PING[self.flavor]}"

    @property
    def data(self) -> Path:
        return self.dir / "data"

    def wipe(self) -> None:
        """Forgets what it holds. It must not run: start it again afterwards."""
        if self.alive():
            raise LabError(f"{self.name} runs")
        for name in ("data", "cache"):
            shutil.rmtree(self.dir / name, ignore_errors=True)

    def stored(self) -> list[Path]:
        """Files that hold cached content."""
        return [path for path in self.data.rglob("*") if path.is_file() and self._is_content(path)]

    def _is_content(self, path: Path) -> bool:
        if self.flavor == CLASSIC:
            return path.name == "data"  # data/<task>/<peer>/data, metadata beside it
        return "content" in path.relative_to(self.data).parts[0]  # data/content/..., rocksdb beside it


class Dragonfly:
    """A cluster whose peers take misses to `registry` (a URL) unless a request's header names another one.

    `prefetch`: a ranged read makes a dfdaemon fetch the whole blob, as the deployment's Helm values have it. `seed`:
    one more dfdaemon fetches for all; without it peers go to the registry themselves. `back_to_source` False (modern):
    peers never go there. `schedule_timeout`: how long a dfdaemon waits for its scheduler. `mirror_port`: of the first
    peer.
    """

    def __init__(
        self,
        work: Path,
        registry: str,
        *,
        flavor: str = CLASSIC,
        peers: int = 1,
        seed: bool = True,
        prefetch: bool = False,
        back_to_source: bool = True,
        keep: bool = True,
        schedule_timeout: str = "30s",
        mirror_port: int | None = None,
    ) -> None:
        if flavor not in FLAVORS:
            raise LabError(f"Dragonfly is {' or '.join(FLAVORS)}, not {flavor}")
        if reason := missing(flavor):
            raise LabError(reason)
        if len(str(work)) > 85:  # a unix socket lies in it
            raise LabError(f"{work} is too long")
        self.work, self.registry, self.flavor = work, registry, flavor
        self.prefetch, self.keep, self.schedule_timeout = prefetch, keep, schedule_timeout
        self.back_to_source = back_to_source
        self._scheduler_port, self._manager_port = quiet_port(), quiet_port()
        self.seed = self._peer("seed", seed=True) if seed else None
        self.peers = [
            self._peer(f"peer{number}", mirror_port=mirror_port if number == 0 else None) for number in range(peers)
        ]
        self.scheduler = self._make_scheduler()
        self.manager = self._make_manager() if flavor == CLASSIC else None

    # -- use

    def mirror(self, number: int = 0, **more: Any) -> dict[str, Any]:
        """One entry of `mirrors` as the deployment's configuration has it."""
        header = {"X-Dragonfly-Registry": self.registry}
        return {"host": self.peers[number].url, "auth_through": False, "headers": header, **more}

    def _stages(self) -> list[list[Program]]:
        """What may be started together. Classic: a seed that is there before the scheduler gets the first miss."""
        seed: list[Program] = [self.seed] if self.seed is not None else []
        if self.manager is None:
            return [[self.scheduler], [*seed, *self.peers]]
        return [[self.manager], seed, [self.scheduler], [*self.peers]]

    def programs(self) -> list[Program]:
        return [program for stage in self._stages() for program in stage]

    def start(self) -> Dragonfly:
        try:
            for stage in self._stages():
                with ThreadPoolExecutor() as together:  # a dfdaemon takes seconds, most of them waiting
                    for started in [together.submit(program.start) for program in stage]:
                        started.result()
        except BaseException:
            self.stop()
            raise
        return self

    def stop(self) -> None:
        """All at once: each may take seconds to say goodbye to one that is gone."""
        for program in self.programs():
            program.kill()

    def __enter__(self) -> Dragonfly:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    # -- configuration: JSON, which is YAML

    def _write(self, path: Path, config: dict[str, Any]) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(config, indent=1))
        return path

    def _binary(self, name: str) -> Path:
        path = ref_bin(name)
        assert path is not None
        return path

    def _peer(self, name: str, *, seed: bool = False, mirror_port: int | None = None) -> Peer:
        directory = self.work / name
        ports = Ports(mirror_port or quiet_port(), *(quiet_port() for _ in range(6)))
        argv: list[str | Path]
        if self.flavor == CLASSIC:
            config, content = directory / "dfget.yaml", self._classic_daemon
            argv = [self._binary("dfget"), "daemon", "--config", config]
        else:
            config, content = directory / "dfdaemon.yaml", self._modern_daemon
            addresses = {"scheduler": {"addrs": [f"127.0.0.1:{self._scheduler_port}"]}}
            dynconfig = self._write(directory / "dynconfig.yaml", addresses)
            argv = [self._binary("dfdaemon"), "--config", config, "--dynconfig", dynconfig]
            argv += ["--log-dir", directory / "logs", "--log-level", "info"]

        def configure(ports: Ports) -> None:
            self._write(config, content(name, directory, ports, seed))

        return Peer(name, self.flavor, directory, argv, ports, configure)

    def _classic_daemon(self, name: str, directory: Path, ports: Ports, seed: bool) -> dict[str, Any]:
        def listen(port: int) -> dict[str, Any]:
            return {"listen": "127.0.0.1", "port": port}

        plain = {"insecure": True}
        return {
            "aliveTime": "0s",
            "gcInterval": "1m",
            "workHome": str(directory),
            **{f"{kind}Dir": str(directory / kind) for kind in ("cache", "plugin", "data")},
            "logDir": str(directory / "logs"),
            "keepStorage": self.keep,
            "pprof-port": -1,
            "metrics": f"127.0.0.1:{ports.metrics}",
            "host": {"hostname": f"lab-{name}", "advertiseIP": "127.0.0.1"},
            "scheduler": {
                "manager": {"enable": False, "seedPeer": {"enable": seed, "type": "super", "clusterID": 1}},
                "netAddrs": [{"type": "tcp", "addr": f"127.0.0.1:{self._scheduler_port}"}],
                "scheduleTimeout": self.schedule_timeout,
                "disableAutoBackSource": False,
            },
            "announcer": {"schedulerInterval": "5s"},
            "download": {
                "calculateDigest": True,
                "totalRateLimit": "1024Mi",
                "perPeerRateLimit": "512Mi",
                "pieceDownloadTimeout": "30s",
                "prefetch": self.prefetch,
                "downloadGRPC": {"security": plain, "unixListen": {"socket": str(directory / "d.sock")}},
                "peerGRPC": {"security": plain, "tcpListen": listen(ports.rpc)},
            },
            "upload": {"rateLimit": "1024Mi", "security": plain, "tcpListen": listen(ports.upload)},
            "objectStorage": {"enable": False},
            "storage": {
                "dataPath": str(directory / "data"),
                "taskExpireTime": "6h",
                "strategy": "io.d7y.storage.v2.advance",
                "diskGCThresholdPercent": 95,
                "multiplex": True,
            },
            "health": {"security": plain, "path": PING[CLASSIC], "tcpListen": listen(ports.health)},
            "proxy": {
                "defaultFilter": "Expires&Signature&ns",
                "security": plain,
                "tcpListen": listen(ports.mirror),
                "registryMirror": {"dynamic": True, "url": self.registry, "insecure": True, "direct": False},
                "proxies": [{"regx": "blobs/sha256.*"}],
            },
            "network": {"enableIPv6": False},
        }

    def _modern_daemon(self, name: str, directory: Path, ports: Ports, seed: bool) -> dict[str, Any]:
        def listen(port: int) -> dict[str, Any]:
            return {"server": {"ip": "127.0.0.1", "port": port}}

        return {
            "host": {"hostname": f"lab-{name}", "ip": "127.0.0.1"},
            "server": {"pluginDir": str(directory / "plugins"), "cacheDir": str(directory / "cache")},
            "download": {"server": {"socketPath": str(directory / "d.sock")}, "concurrentPieceCount": 8},
            "upload": listen(ports.rpc),
            "scheduler": {
                "announceInterval": "5s",
                "scheduleTimeout": self.schedule_timeout,
                "maxScheduleCount": 5,
            },
            # The scheduler learns of seeds from their own announcements.
            "seedPeer": {"enable": seed, "type": "super" if seed else "normal"},
            "dynconfig": {"refreshInterval": "5s"},
            "storage": {
                "dir": str(directory / "data"),
                "keep": self.keep,
                "server": {"ip": "127.0.0.1", "tcpPort": ports.upload, "quicPort": ports.quic},
            },
            # The default (80) looks at the whole file system and empties the cache on a fuller disk.
            "gc": {"interval": "900s", "policy": {"diskHighThresholdPercent": 99, "diskLowThresholdPercent": 98}},
            "proxy": {
                **listen(ports.mirror),
                "rules": [{"regex": "blobs/sha256.*"}],
                "registryMirror": {"addr": self.registry},
                "disableBackToSource": not (self.back_to_source or seed),
                "prefetch": self.prefetch,
            },
            "health": listen(ports.health),
            "metrics": listen(ports.metrics),
            "stats": listen(ports.stats),
        }

    def _make_scheduler(self) -> Program:
        directory, port = self.work / "scheduler", self._scheduler_port
        server: dict[str, Any] = {
            "advertiseIP": "127.0.0.1",
            "advertisePort": port,
            "listenIP": "127.0.0.1",
            "port": port,
            "host": "lab-scheduler",
            "logDir": str(directory / "logs"),
            "pluginDir": str(directory / "plugins"),
        }
        config: dict[str, Any] = {
            "server": server,
            "scheduler": {
                "algorithm": "default",
                "backToSourceCount": 200,
                # This and the next two are Dragonfly's defaults. With 2 here 0.6 % of the ranges that two nodes missed
                # at the same moment were fetched twice, with 5 none of 600.
                "retryBackToSourceLimit": 5,
                "retryLimit": 10,
                "retryInterval": "50ms",
            },
            "dynConfig": {"refreshInterval": "5s"},
            "job": {"enable": False},
            "metrics": {"enable": False},
        }
        argv: list[str | Path]
        if self.flavor == CLASSIC:
            server["workHome"] = str(directory)
            server["cacheDir"], server["dataDir"] = str(directory / "cache"), str(directory / "data")
            config["manager"] = {
                "addr": f"127.0.0.1:{self._manager_port}",
                "schedulerClusterID": 1,
                "keepAlive": {"interval": "5s"},
            }
            config["seedPeer"] = {"enable": self.seed is not None}
            config["security"] = {"autoIssueCert": False}
            config["networkTopology"] = config["trainer"] = {"enable": False}
            config["pprof-port"] = -1
            argv = [self._binary("scheduler"), "--config", self._write(directory / "scheduler.yaml", config)]
        else:
            path = self._write(directory / "scheduler.yaml", config)
            argv = [self._binary("scheduler-2.5.1"), "--config", path, "--dynconfig", directory / "dynconfig.yaml"]
        return Program("scheduler", argv, directory / "out.log", [port])

    def _make_manager(self) -> Program:
        argv: list[str | Path] = [self._binary("labmanager"), "-listen", f"127.0.0.1:{self._manager_port}"]
        argv += ["-scheduler", f"lab-scheduler,127.0.0.1,{self._scheduler_port}"]
        if self.seed is not None:
            argv += ["-seeds", f"lab-seed,127.0.0.1,{self.seed.at.rpc},{self.seed.at.upload}"]
        return Program("manager", argv, self.work / "manager" / "out.log", [self._manager_port])


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.lab.dragonfly", description="Runs real Dragonfly on loopback until Ctrl-C."
    )
    parser.add_argument("work", type=Path, help="an empty directory with a short path")
    parser.add_argument("--registry", default="http://127.0.0.1:5000", metavar="URL")
    parser.add_argument("--flavor", choices=FLAVORS, default=CLASSIC)
    parser.add_argument("--peers", type=int, default=1)
    parser.add_argument("--mirror-port", type=int, default=65001, help="of the first peer")
    parser.add_argument("--prefetch", action="store_true")
    parser.add_argument("--no-seed", action="store_true")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with Dragonfly(
            options.work.resolve(),
            options.registry,
            flavor=options.flavor,
            peers=options.peers,
            seed=not options.no_seed,
            prefetch=options.prefetch,
            mirror_port=options.mirror_port,
        ) as dragonfly:
            for peer in dragonfly.peers:
                print(f"{peer.name}: mirror {peer.url}, ping {peer.ping_url}, pid {peer.pid}", flush=True)
            signal.pause()
    except KeyboardInterrupt:
        pass
    except LabError as error:
        sys.exit(f"dragonfly: {error}")


__all__ = ["CLASSIC", "FLAVORS", "MODERN", "Dragonfly", "Peer", "Program", "missing", "tail"]

if __name__ == "__main__":
    main()
