"""`nydusctl node install`, step by step; each can be repeated, and the last one undoes itself when containerd fails."""

from __future__ import annotations

import difflib
import glob
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from snapshotter.containerdfile import read_config, release_of
from snapshotter.errors import InstallError
from snapshotter.install.containerd import Edited, Wish, edited, judge
from snapshotter.install.host import Host
from snapshotter.install.parts import (
    CONFIG,
    UNIT,
    UNIT_FILE,
    Record,
    checked_config,
    default_config,
    digest,
    packaged_unit,
    program_path,
    unit_text,
)
from snapshotter.install.target import Target, find, trial_of
from snapshotter.install.tomlfile import lookup, parse
from snapshotter.processes import peer_pid
from snapshotter.settings import ADDRESS

START_SECONDS = 30.0

CRI_IDS = ("cri", "images", "runtime")  # 1.x; the parts of 2.x

Say = Callable[[str], None]


@dataclass(frozen=True)
class Choices:
    """`config`: a file whose content becomes CONFIG. `restart`: services may be started."""

    containerd_config: str = ""
    runtimes: tuple[str, ...] = ()
    replace: bool = False
    bin: str = ""
    config: str = ""
    restart: bool = True
    dry_run: bool = False


@dataclass
class Plan:
    """File -> what it is and what it is to be; both None where nothing is."""

    files: dict[str, tuple[str | None, str | None]]

    def diff(self) -> str:
        out: list[str] = []
        for path, (before, after) in self.files.items():
            if before != after:
                names = (path if before is not None else "/dev/null", path if after is not None else "/dev/null")
                old, new = ((text or "").splitlines(keepends=True) for text in (before, after))
                lines = difflib.unified_diff(old, new, *names)
                out += [line if line.endswith("\n") else f"{line}\n\\ No newline at end of file\n" for line in lines]
        return "".join(out)

    def changed(self, path: str) -> bool:
        before, after = self.files.get(path, (None, None))
        return before != after


def install(host: Host, choices: Choices, say: Say) -> None:
    """Raises InstallError; a containerd that does not come back has its configuration of before then."""
    if host.here and os.geteuid() != 0 and not choices.dry_run:
        raise InstallError("must run as root: it writes to /etc and starts services")
    starts = host.systemd and choices.restart
    if starts:
        _refuse_another(host)
    program = program_path(host, choices.bin)
    target = find(host, choices.containerd_config)
    file = target.file
    containerd = target.program(host)
    release = release_of(host.run([containerd, "--version"], timeout=30)[1]) if containerd else ()
    before = host.read(file)
    start = target.start if before is None else before
    wish = Wish(runtimes=choices.runtimes, release=release, replace=choices.replace, beside=target.beside)
    change = edited(start, file, wish)
    record = Record.read(host)
    plan = Plan({file: (before, change.text)})
    _plan_files(host, choices, program, record, plan, say)
    if containerd:
        for line in _try(host, containerd, target, change):
            say(line)
    else:
        say("containerd is not installed here: its configuration is written but was not tried")
    for line in [*change.notes, *([target.note] if target.note and before is None else [])]:
        say(line)
    if choices.dry_run:
        say(plan.diff() or "nothing would be changed")
        return
    created = before is None if record is None else record.created_config
    record = Record("installing", file, created, dict(record.files) if record else {})
    if before is None:
        record.files[file] = digest(start)  # to be removed again, if nobody adds to it
    record.write(host)
    for path in (CONFIG, UNIT_FILE):
        if path in plan.files:
            _write(host, record, plan, path, say)
    if starts:
        _start(host, plan, say)  # before containerd is told of it: a CRI plugin without its snapshotter does not load
    if plan.changed(file):
        host.write(file, change.text)
        say(f"{file}: edited for {_told(release)}")
    if starts:
        _restart_or_undo(host, plan, target, before, say)
    elif not host.here:
        _enable_below(host, plan)
    record.state = "installed"
    record.write(host)
    if starts:
        say("installed; `nydusctl doctor` looks at all of it")
    else:
        if host.here and not host.systemd:
            say("systemd does not run here: start the snapshotter before containerd by other means")
        by_hand = f"nothing was started: systemctl enable --now {UNIT}, then systemctl restart {target.service(host)}"
        say(f"installed; {by_hand}" if host.here else f"installed below {host.root}; it all starts at its next boot")


def _refuse_another(host: Host) -> None:
    """A snapshotter that is not our service's: beside it ours ends at each start, and all the rest looks well."""
    if host.is_active(UNIT):
        return
    try:
        pid = peer_pid(Path(ADDRESS))
    except OSError:
        return
    raise InstallError(
        f"{ADDRESS} is served by another process (pid {pid}): stop it for good (systemctl status {pid} names its "
        "service, systemctl disable --now stops that), then run this again"
    )


def _told(release: tuple[int, ...]) -> str:
    return f"containerd {'.'.join(map(str, release))}" if release else "a containerd that is not here yet"


def _plan_files(host: Host, choices: Choices, program: str, record: Record | None, plan: Plan, say: Say) -> None:
    config = host.read(CONFIG)
    source = Path(choices.config)
    try:
        wanted = checked_config(source.read_text(), source) if choices.config else default_config()
    except OSError as failure:
        raise InstallError(f"{source}: {failure.strerror}") from None
    if config is None or (record is not None and record.ours(host, CONFIG)):
        plan.files[CONFIG] = (config, wanted)
    elif config != wanted:
        say(f"{CONFIG}: kept as it is")
    if found := packaged_unit(host, program):
        say(f"{found}: the service of a package, used as it is")
        return
    unit = host.read(UNIT_FILE)
    if unit is not None and unit != unit_text(program) and not (record is not None and record.ours(host, UNIT_FILE)):
        raise InstallError(
            f"{UNIT_FILE} is there and was not written by this program: move it away (changes belong into "
            f"{UNIT_FILE}.d/*.conf), then run this again"
        )
    plan.files[UNIT_FILE] = (unit, unit_text(program))


def _write(host: Host, record: Record, plan: Plan, path: str, say: Say) -> None:
    after = plan.files[path][1]
    assert after is not None
    record.files[path] = digest(after)
    record.write(host)
    if plan.changed(path):
        host.write(path, after)
        say(f"{path}: written")


def _try(host: Host, containerd: str, target: Target, change: Edited) -> list[str]:
    """containerd's own verdict on the new file, which lies beside the old one for that time. Raises InstallError."""
    file = target.file
    trials = {trial_of(os.path.realpath(file) if host.here else file): change.text}
    main = next(iter(trials))
    if target.imported:
        main = trial_of(target.main)
        trials[main] = target.trial(host)
    try:
        for path, text in trials.items():
            host.write(path, text)
        status, out, error = host.run([containerd, "-c", main, "config", "dump"], check=False, timeout=30)
    finally:
        for path in trials:
            host.remove(path)
    if status:
        said = error.strip().splitlines()
        raise InstallError(f"{file}: containerd refuses the edited file: {said[-1] if said else f'status {status}'}")
    imports = lookup(target.beside or parse(change.text, file), ("imports",)) or []
    found = [
        Path(name)
        for pattern in imports
        for name in sorted(glob.glob(str(host.path(Path(file).parent / str(pattern)))))
        if name != str(host.path(file))
    ]
    return judge(out, change, Path(file), found)


def _enable_below(host: Host, plan: Plan) -> None:
    wants = host.path(f"/etc/systemd/system/multi-user.target.wants/{UNIT}")
    if not host.enabled(UNIT):
        wants.parent.mkdir(parents=True, exist_ok=True)
        wants.symlink_to(UNIT_FILE if UNIT_FILE in plan.files else f"/usr/lib/systemd/system/{UNIT}")


def _start(host: Host, plan: Plan, say: Say) -> None:
    host.systemctl("daemon-reload")
    host.systemctl("enable", UNIT)
    running = host.is_active(UNIT)
    if not running or plan.changed(UNIT_FILE) or plan.changed(CONFIG):
        host.systemctl("restart", UNIT)  # nydusd and its mounts stay
    if not _within(lambda: _answers(Path(ADDRESS))):
        raise InstallError(
            f"{UNIT} does not answer at {ADDRESS} within {START_SECONDS:.0f} s: journalctl -u {UNIT} says why. "
            "containerd was not touched"
        )
    say(f"{UNIT}: {'runs' if running else 'started'}")


def _restart_or_undo(host: Host, plan: Plan, target: Target, before: str | None, say: Say) -> None:
    file = target.file
    if not plan.changed(file) and _loaded(target.main):
        return
    cri = _cri(target.main) or ""
    problem = restart_containerd(host, target, cri)
    if problem and plan.changed(file):
        if before is None:
            host.remove(file)
        else:
            host.write(file, before)
        again = restart_containerd(host, target, cri, plugin=False)
        state = f"and it does not start with that either: {again}" if again else "and it runs again as before"
        raise InstallError(f"{problem}; {file} is as it was, {state}. The snapshotter stays")
    if problem:
        raise InstallError(problem)
    say(f"{target.service(host)}: restarted, its plugin for this snapshotter is loaded; containers went on")


def restart_containerd(host: Host, target: Target, cri_before: str, plugin: bool = True) -> str:
    """What is wrong with containerd afterwards, "" if nothing is. `cri_before`: what was wrong with CRI before."""
    unit = target.service(host)
    status, _, error = host.systemctl("restart", unit, check=False)
    if status:
        said = error.strip().splitlines()
        return f"systemctl restart {unit}: {said[-1] if said else f'status {status}'}"
    if not _within(lambda: _loaded(target.main) if plugin else _cri(target.main) is not None):
        missing = "does not load the snapshotter" if plugin else "does not answer"
        return f"containerd {missing} within {START_SECONDS:.0f} s (journalctl -u {unit})"
    cri = _cri(target.main)
    return f"containerd's CRI plugin does not load: {cri}" if cri and not cri_before else ""


def _cri(file: str) -> str | None:
    """Why containerd does not serve Kubernetes, "" if it does or was told not to, None where nobody answers."""
    from nydusfs.containerd.connection import Connection, ContainerdError
    from protos.containerd.services.introspection.v1 import introspection_pb2, introspection_pb2_grpc

    try:
        with Connection(address_of(file), "default", "nydusctl") as connection:
            service = connection.stub(introspection_pb2_grpc.IntrospectionStub)
            reply = connection.call("listing plugins", service.Plugins, introspection_pb2.PluginsRequest(), timeout=5)
    except ContainerdError:
        return None
    failed = [one.init_err.message for one in reply.plugins if one.id in CRI_IDS and one.init_err.message]
    return failed[0] if failed else ""


def address_of(file: str) -> str:
    from snapshotter.node import grpc_address

    return grpc_address(read_config(Path(file))[0])


def _loaded(file: str) -> bool:
    """Whether containerd reaches this snapshotter: asked for a snapshot that is not there, by its own name for it."""
    from nydusfs.containerd.client import Containerd
    from nydusfs.containerd.connection import ContainerdError
    from snapshotter.node import Containerd as Known

    config, _ = read_config(Path(file))
    name = Known("", Path(file), config=config).snapshotter_name(Path(ADDRESS))
    try:
        with Containerd(address_of(file), "default", "nydusctl") as client:
            return bool(name) and not client.has_snapshot(name, "nydusctl-node-install")
    except ContainerdError:
        return False


def _answers(path: Path) -> bool:
    from snapshotter.doctor.services import listens

    return path.exists() and listens(path)


def _within(ready: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + START_SECONDS
    while not ready():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True
