"""containerd's configuration of versions 1 to 4: which keys make it use this snapshotter, and whether they will.

The last word is containerd's own: `config dump` of the edited file, before it takes the place of the old one, must show
what was meant. A file that is imported wins over the main one: in 1.6.20 it replaces the whole section of a plugin, in
2.3.4 single keys.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from snapshotter.errors import InstallError
from snapshotter.install.edit import Editor, restored
from snapshotter.install.tomlfile import dumped, header, lookup, parse, statements
from snapshotter.settings import ADDRESS, OLD_ROOT

CRI = {
    1: ("plugins", "cri", "containerd"),
    2: ("plugins", "io.containerd.grpc.v1.cri", "containerd"),
    3: ("plugins", "io.containerd.cri.v1.images"),
    4: ("plugins", "io.containerd.cri.v1.images"),
}
RUNTIMES = {
    1: (*CRI[1], "runtimes"),
    2: (*CRI[2], "runtimes"),
    3: ("plugins", "io.containerd.cri.v1.runtime", "containerd", "runtimes"),
    4: ("plugins", "io.containerd.cri.v1.runtime", "containerd", "runtimes"),
}
UNPACK = ("plugins", "io.containerd.transfer.v1.local", "unpack_config")
DEFAULT = "overlayfs"
_MACHINES = {"x86_64": "amd64", "aarch64": "arm64", "armv7l": "arm/v7", "i686": "386"}

Path_ = tuple[str, ...]


@dataclass(frozen=True)
class Wish:
    """`release`: of the containerd program, () where it is not known. `runtimes`: of these alone, not CRI's default.
    `beside`: the configuration that imports the edited file; 2.x merges the two key by key."""

    address: str = ADDRESS
    root: str = OLD_ROOT  # that of `--config-path`
    runtimes: tuple[str, ...] = ()
    release: tuple[int, ...] = ()
    replace: bool = False
    beside: Mapping[str, Any] = field(default_factory=dict)


@dataclass
class Edited:
    """`wanted`: path in configurations of a version -> value, as `config dump` must show them."""

    text: str
    name: str  # of the proxy plugin
    notes: list[str]
    wanted: list[tuple[Callable[[int], Path_], Any]]


def edited(before: str, file: object, wish: Wish) -> Edited:
    """The file with what this snapshotter needs, whether or not it was edited before. Raises InstallError."""
    plain = restored(before, file)
    edit = Editor(plain, file)
    notes: list[str] = []
    version = _version(edit, wish)
    name = _proxy(edit, wish, version)
    wanted: list[tuple[Callable[[int], Path_], Any]] = [(lambda _: ("proxy_plugins", name, "address"), wish.address)]
    over: Collection[Any] | None = None if wish.replace else (DEFAULT, "")
    # 2.3.4 takes `containerd.snapshotter` of an older version over only where that names `runtimes` too, and reads
    # its own sections in such a file
    sections = dict.fromkeys(CRI[one] for one in ((version, 3) if wish.release >= (2,) else (version,)))
    if wish.runtimes:
        wanted += _runtimes(edit, wish, version, name, over, notes)
    else:
        for cri in sections:
            _free(wish, (*cri, "snapshotter"), name, over)
            edit.set((*cri, "snapshotter"), name, over)
        wanted.append((lambda v: (*CRI[v], "snapshotter"), name))
    for cri in sections:
        edit.set((*cri, "disable_snapshot_annotations"), False, None)
    wanted.append((lambda v: (*CRI[v], "disable_snapshot_annotations"), False))
    if wish.release >= (2, 1) or (not wish.release and version >= 3):
        notes += _transfer(edit, name)
    disabled = lookup(edit.value, ("disabled_plugins",))
    if isinstance(disabled, list) and {"cri", CRI[2][1], CRI[3][1]} & set(map(str, disabled)):
        place = edit.where(("disabled_plugins",))
        notes.append(f"{place}: CRI is switched off: Kubernetes cannot use this containerd, nerdctl and ctr can")
    return Edited(edit.text(), name, notes, wanted)


def _free(wish: Wish, path: Path_, value: str, over: Collection[Any] | None) -> None:
    """Raises InstallError where the file beside sets a key to what somebody wants."""
    now = lookup(wish.beside, path)
    if now is not None and now != value and over is not None and now not in over:
        raise InstallError(
            f"{path[-1]} is {dumped(now)} in the configuration that this is added to, not {dumped(value)}: somebody "
            "wants it so. Change it, or allow it with --replace"
        )


def _version(edit: Editor, wish: Wish) -> int:
    version = edit.value.get("version")
    if version is None and not edit.value and "version" in wish.beside:
        version = wish.beside["version"]
        edit.set(("version",), version, None)
    if version is None and edit.value:
        version = 1  # containerd's rule for a file that does not say
    if version is None:
        version = 3 if wish.release >= (2,) else 2
        edit.set(("version",), version, None)
    if version not in CRI:
        raise InstallError(
            f"{edit.where(('version',))}: configuration version {version!r} is not known here (1 to {max(CRI)} are)"
        )
    if version > 2 and wish.release and wish.release < (2,):
        release = ".".join(map(str, wish.release))
        raise InstallError(f"{edit.where(('version',))}: containerd {release} reads versions 1 and 2 alone")
    return int(version)


def _proxy(edit: Editor, wish: Wish, version: int) -> str:
    """Adds the proxy plugin, or finds the one that has our address. Its name."""
    found = lookup(edit.value, ("proxy_plugins",))
    proxies = found if isinstance(found, dict) else {}
    name = next(
        (
            key
            for key, one in proxies.items()
            if lookup(one, ("type",)) == "snapshot"
            and str(lookup(one, ("address",))).removeprefix("unix://") == wish.address
        ),
        "",
    )
    over: tuple[str, ...] | None = None if wish.replace else ()
    if not name:
        name = "nydus"
        edit.set(("proxy_plugins", name, "type"), "snapshot", over)
        edit.set(("proxy_plugins", name, "address"), wish.address, over)
    if wish.release >= (1, 7, 16) or version >= 3:  # older ones warn about a key they do not know
        exports = ("proxy_plugins", name, "exports")
        edit.set((*exports, "root"), wish.root, over)
        if wish.release >= (2, 1) or not wish.release:
            edit.set((*exports, "enable_remote_snapshot_annotations"), "true", None)
    return name


def _runtimes(
    edit: Editor, wish: Wish, version: int, name: str, over: Collection[Any] | None, notes: list[str]
) -> list[tuple[Callable[[int], Path_], Any]]:
    """`snapshotter` of single runtimes; one that is not there is made like the default one."""
    if wish.release and wish.release < (1, 7):
        release = ".".join(map(str, wish.release))
        raise InstallError(
            f"containerd {release} has one snapshotter for all runtimes (from 1.7 on each may have its own): "
            "leave --runtime out"
        )
    wanted: list[tuple[Callable[[int], Path_], Any]] = []
    base = RUNTIMES[version]
    for runtime in wish.runtimes:
        if lookup(edit.value, (*base, runtime)) is None:
            there = edit.value if lookup(edit.value, base) or not wish.beside else wish.beside
            usual = str(lookup(there, (*base[:-1], "default_runtime_name")) or "runc")
            model = lookup(there, (*base, usual))
            if not isinstance(model, dict):
                model = {"runtime_type": "io.containerd.runc.v2"}
                notes.append(
                    f"runtime {runtime} has containerd's own settings of runc; if kubelet's cgroup driver is systemd, "
                    f"write SystemdCgroup = true into a {header((*base, runtime, 'options'))}"
                )
            for path, value in _leaves(model):
                if path != ("snapshotter",):
                    edit.set((*base, runtime, *path), value, None)
        edit.set((*base, runtime, "snapshotter"), name, over)
        wanted.append((lambda v, runtime=runtime: (*RUNTIMES[v], runtime, "snapshotter"), name))  # type: ignore[misc]
        if version >= 3 or wish.release >= (2,):  # where the images are pulled to
            platforms = (*CRI[3], "runtime_platforms", runtime)
            edit.set((*platforms, "snapshotter"), name, over)
            edit.set((*platforms, "platform"), platform(), None)
    return wanted


def _leaves(table: dict[str, Any]) -> list[tuple[Path_, Any]]:
    found: list[tuple[Path_, Any]] = []
    for key, value in table.items():
        if isinstance(value, dict):
            found += [((key, *path), leaf) for path, leaf in _leaves(value)]
        else:
            found.append(((key,), value))
    return found


def _transfer(edit: Editor, name: str) -> list[str]:
    """The pulls of nerdctl and ctr by the transfer service; entries, once there are any, replace the default one."""
    entries = lookup(edit.value, UNPACK)
    if isinstance(entries, list):
        if any(lookup(one, ("snapshotter",)) == name for one in entries):
            return []
        found = edit.find(UNPACK)
        if found is None or found.kind != "array":
            entry = dumped({"platform": platform(), "snapshotter": name})
            return [f"{edit.where(UNPACK)}: add {entry} to this list for pulls by nerdctl and ctr; CRI needs it not"]
    edit.append(UNPACK, {"platform": platform(), "snapshotter": name})
    if not entries:
        edit.append(UNPACK, {"platform": platform(), "snapshotter": DEFAULT})
    return []


def platform() -> str:
    machine = os.uname().machine
    return f"linux/{_MACHINES.get(machine, machine)}"


def judge(dump: str, edit: Edited, file: Path, imported: Sequence[Path]) -> list[str]:
    """Notes on what containerd, by its `config dump`, makes of the file. Raises InstallError if not what was meant."""
    found = parse(dump[dump.index("\nversion = ") + 1 :] if "\nversion = " in dump else dump, "containerd config dump")
    version = found.get("version")
    if version not in CRI:
        return [f"this containerd's configuration is of version {version}, which is not known here: not checked"]
    for where, value in edit.wanted:
        path = where(version)
        now = lookup(found, path)
        if now == value:
            continue
        if now is None and lookup(found, path[:2]) is None and path[0] == "plugins":
            return ["containerd has no CRI plugin: nerdctl and ctr alone are served"]
        raise InstallError(_overridden({where(v)[:2] for v in CRI}, path, value, now, file, imported))
    return []


def _overridden(
    sections: Collection[Path_], path: Path_, value: Any, now: Any, file: Path, imported: Sequence[Path]
) -> str:
    said = f"{file}: containerd would take {dumped(now) if now is not None else 'nothing'} for {header(path)}, not "
    said += dumped(value)
    for one in imported:
        try:
            text = one.read_text()
            parse(text, one)
            lines = text.splitlines(keepends=True)
            hit = next((found for found in statements(lines, one) if found.path[:2] in sections), None)
        except (OSError, InstallError):
            continue
        if hit is not None:
            return (
                f"{said}: {one}:{hit.line}, which it imports, has {header(hit.path[:2])} too and wins. "
                f"Move those lines to {file}, or add {path[-1]} = {dumped(value)} there by hand"
            )
    return said
