"""The sample images: a real one of a few hundred megabytes from the host's Debian packages and PyPI, and small ones.

The real one is what people run: Debian, the Python runtime, numpy, scipy, pandas and scikit-learn, an application;
six layers.
Files come from installed packages (`dpkg -L` of a dependency closure), wheels from pip; the result is kept in a cache
directory and reused. debootstrap would give the same tree, but takes over a minute and a mirror of all packages.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import stat
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.lab.images import EPOCH, Blob, Image, ImageLayout, Layer, Member, entry
from tests.lab.process import LabError, run

VERSION = 2  # raise when the recipe changes: it names the cache
WHEELS = tuple(
    names.split()
    for names in (
        """numpy==2.2.6 matplotlib==3.9.4 contourpy==1.3.1 cycler==0.12.1 fonttools==4.55.3 kiwisolver==1.4.8
        packaging==24.2 pillow==11.1.0 pyparsing==3.2.1""",
        "scipy==1.15.3",
        """pandas==2.2.3 python-dateutil==2.9.0.post0 pytz==2025.2 tzdata==2025.2 six==1.17.0 scikit-learn==1.5.2
        joblib==1.4.2 threadpoolctl==3.5.0""",
    )
)
BASE = [
    "apt",
    "base-files",
    "bash",
    "bsdutils",
    "coreutils",
    "dash",
    "debconf",
    "debian-archive-keyring",
    "debianutils",
    "diffutils",
    "dpkg",
    "findutils",
    "gpgv",
    "grep",
    "gzip",
    "hostname",
    "libc-bin",
    "login",
    "mount",
    "ncurses-base",
    "ncurses-bin",
    "passwd",
    "perl-base",
    "procps",
    "sed",
    "sysvinit-utils",
    "tar",
    "tzdata",
    "util-linux",
]
RUNTIME = [
    "ca-certificates",
    "libgdbm6",
    "libreadline8",
    "libsqlite3-0",
    "media-types",
    "netbase",
    "openssl",
    "python3",
    "python3-minimal",
    "python3-pip",
    "python3-venv",
    "python3.11",
]

APP = """\
import sys, time
begin = time.time()
import asyncio, email.parser, hashlib, http.server, json, logging.config, sqlite3, ssl, urllib.request, uuid
db = sqlite3.connect(":memory:")
db.execute("create table hits(path text, n integer)")
print(json.dumps({"ready": True, "python": sys.version.split()[0], "openssl": ssl.OPENSSL_VERSION,
                  "sqlite": sqlite3.sqlite_version, "import_seconds": round(time.time() - begin, 3)}), flush=True)
"""
COMMAND = ("python3", "/app/serve.py")


def cache_dir() -> Path:
    """Where built things are kept between runs: $NYDUS_LAB_CACHE, else nydus-py in the user's cache directory."""
    if named := os.environ.get("NYDUS_LAB_CACHE"):
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nydus-py"


def sample_image(say: Callable[[str], None] = lambda text: None) -> Image:
    """The real image, from the cache or built now (about 40 s and 60 MB from PyPI).

    LabError when packages or wheels are missing.
    """
    directory = cache_dir() / f"sample-{VERSION}"
    if (directory / "layers.json").exists():
        return load_image(directory)
    part = directory.with_name(f"{directory.name}.part-{os.getpid()}")
    shutil.rmtree(part, ignore_errors=True)
    try:
        layout = ImageLayout(part)
        wheels = _download_wheels(say)
        base = _closure(BASE)
        runtime = [name for name in _closure(RUNTIME) if name not in base]
        say(f"building six layers: {len(base)} + {len(runtime)} Debian packages, {sum(map(len, wheels))} wheels")
        # Two threads: zlib and sha256 run outside the interpreter lock, and the largest layers (base, scipy) overlap.
        jobs: list[Callable[[], Iterable[Member]]] = [
            lambda: _package_members(base, skeleton=True),
            lambda: _package_members(runtime, skeleton=False),
            *(lambda names=names: _wheel_members(names) for names in wheels),
            lambda: [entry("app"), entry("app/serve.py", APP), entry("app/data.json", json.dumps(list(range(2000))))],
        ]
        with ThreadPoolExecutor(2) as pool:
            layers = list(pool.map(lambda job: layout.add_layer(job()), jobs))
        image = layout.finish(
            layers, cmd=COMMAND, env=["PATH=/usr/local/bin:/usr/bin:/bin", "PYTHONDONTWRITEBYTECODE=1"]
        )
        (part / "layers.json").write_text(json.dumps([layer_facts(layer) for layer in image.layers]))
        shutil.rmtree(directory, ignore_errors=True)
        part.rename(directory)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return load_image(directory)


def layer_facts(layer: Layer) -> list[str | int]:
    blob = layer.blob
    return [
        blob.digest,
        blob.size,
        blob.media_type,
        layer.diff_id,
        layer.tar_size,
        layer.entries,
        layer.files,
        layer.content,
    ]


def load_image(directory: Path) -> Image:
    layers = []
    for digest, size, media, *rest in json.loads((directory / "layers.json").read_text()):
        layers.append(Layer(Blob(digest, size, directory / "blobs/sha256" / digest.partition(":")[2], media), *rest))
    described = json.loads((directory / "index.json").read_text())["manifests"][0]
    manifest_path = directory / "blobs/sha256" / described["digest"].partition(":")[2]
    manifest = Blob(described["digest"], described["size"], manifest_path, described["mediaType"])
    config = json.loads(manifest_path.read_text())["config"]
    config_blob = Blob(
        config["digest"], config["size"], directory / "blobs/sha256" / config["digest"][7:], config["mediaType"]
    )
    return Image(directory, manifest, config_blob, layers)


def _download_wheels(say: Callable[[str], None]) -> list[list[Path]]:
    target = cache_dir() / "wheels"
    target.mkdir(parents=True, exist_ok=True)

    def found(name: str) -> Path | None:
        project, _, version = name.partition("==")
        return next(target.glob(f"{project.replace('-', '_')}-{version}-*.whl"), None)

    missing = [name for names in WHEELS for name in names if found(name) is None]
    if missing:
        say(f"downloading {len(missing)} wheels from PyPI ({missing[0]} ...)")
        # For Debian's Python inside the image, whatever interpreter runs this.
        python = "--python-version 3.11 --implementation cp --abi cp311 --abi abi3 --abi none"
        platforms = "--platform manylinux2014_x86_64 --platform manylinux_2_17_x86_64 --platform any"
        options = f"--quiet --no-deps --only-binary :all: {python} {platforms}".split()
        run([sys.executable, "-m", "pip", "download", *options, "--dest", target, *missing], timeout=300)
    groups: list[list[Path]] = []
    for names in WHEELS:
        groups.append([])
        for name in names:
            wheel = found(name)
            if wheel is None:
                raise LabError(f"pip downloaded no wheel of {name} to {target}")
            groups[-1].append(wheel)
    return groups


def _closure(names: Sequence[str]) -> list[str]:
    """Installed packages that `names` need, themselves included, in a stable order."""
    text = run(
        ["dpkg-query", "-W", "-f", "${Package}\\t${db:Status-Abbrev}\\t${Pre-Depends},${Depends}\\t${Provides}\\n"]
    ).stdout
    needs: dict[str, list[str]] = {}
    for line in text.splitlines():
        name, status, depends, _ = line.split("\t")
        if status.startswith("ii"):
            needs[name] = [
                option.split(":")[0].split("(")[0].strip()
                for group in depends.split(",")
                for option in group.split("|")[:1]
                if option.strip()
            ]
    seen: set[str] = set()
    todo = [name for name in names if name in needs]
    while todo:
        name = todo.pop()
        if name not in seen:
            seen.add(name)
            todo.extend(need for need in needs[name] if need in needs)
    return sorted(seen)


def _package_members(packages: Sequence[str], skeleton: bool) -> Iterator[Member]:
    """The files of Debian packages as they lie on the host, compiled Python beside its source included."""
    listing = run(["dpkg", "-L", *packages]).stdout.splitlines()
    paths: set[str] = set()
    folders: dict[str, str] = {}
    for line in listing:
        if not line.startswith("/") or line == "/.":
            continue
        head, _, name = line.rpartition("/")
        # Packages still name /bin/bash; since the merge of /usr that is a link, and a tar must not write through it.
        if head not in folders:
            folders[head] = os.path.realpath(head or "/")
        paths.add(os.path.join(folders[head], name))
    for path in list(paths):
        if path.endswith(".py"):
            head, _, name = path.rpartition("/")
            compiled = f"{head}/__pycache__/{name[:-3]}.cpython-311.pyc"
            if os.path.exists(compiled):
                paths.update((compiled, f"{head}/__pycache__"))
    if skeleton:
        for name, target in (("bin", "usr/bin"), ("sbin", "usr/sbin"), ("lib", "usr/lib"), ("lib64", "usr/lib64")):
            yield entry(name, link=target)
        for name in ("dev", "proc", "sys", "etc", "root", "run", "tmp", "var", "usr"):
            yield entry(name, mode=0o1777 if name == "tmp" else 0o755)
        yield entry(
            "etc/passwd",
            "root:x:0:0:root:/root:/bin/bash\nnobody:x:65534:65534:nobody:/nonexistent:/usr/sbin/nologin\n",
        )
        yield entry("etc/group", "root:x:0:\nnogroup:x:65534:\n")
        yield entry("etc/hosts", "127.0.0.1 localhost\n")
        if os.path.exists("/etc/ld.so.cache"):
            yield from _host_member("/etc/ld.so.cache")
    skip = {
        "/bin",
        "/sbin",
        "/lib",
        "/lib64",
        "/dev",
        "/proc",
        "/sys",
        "/etc",
        "/root",
        "/run",
        "/tmp",
        "/var",
        "/usr",
        "/etc/passwd",
        "/etc/group",
        "/etc/hosts",
        "/etc/ld.so.cache",
    }
    for path in sorted(paths - skip):
        yield from _host_member(path)


def _host_member(path: str) -> Iterator[Member]:
    try:
        found = os.lstat(path)
    except OSError:
        return  # a package's file that this machine's owner removed
    info = tarfile.TarInfo(path.lstrip("/"))
    info.mode, info.uid, info.gid, info.mtime = (
        stat.S_IMODE(found.st_mode),
        found.st_uid,
        found.st_gid,
        int(found.st_mtime),
    )
    if stat.S_ISDIR(found.st_mode):
        info.type, info.mtime = tarfile.DIRTYPE, EPOCH
        yield info, None
    elif stat.S_ISLNK(found.st_mode):
        info.type, info.linkname = tarfile.SYMTYPE, os.readlink(path)
        yield info, None
    elif stat.S_ISREG(found.st_mode):
        info.size = found.st_size
        yield info, Path(path)


def _wheel_members(wheels: Sequence[Path]) -> Iterator[Member]:
    root = "usr/local/lib/python3.11/dist-packages"
    made: set[str] = set()
    for part in ("usr/local", "usr/local/lib", "usr/local/lib/python3.11", root):
        yield entry(part)
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as archive:
            for item in sorted(archive.infolist(), key=lambda item: item.filename):
                if item.is_dir() or ".data/" in item.filename:
                    continue
                folders = item.filename.split("/")[:-1]
                for depth in range(1, len(folders) + 1):
                    folder = "/".join(folders[:depth])
                    if folder not in made:
                        made.add(folder)
                        yield entry(f"{root}/{folder}")
                yield entry(
                    f"{root}/{item.filename}", archive.read(item), mode=0o755 if ".so" in item.filename else 0o644
                )


def host_files(*programs: str) -> list[Member]:
    """Programs of the host with the libraries they load, as members of a small image's base layer."""
    paths: set[str] = set()
    for program in programs:
        found = shutil.which(program)
        if found is None:
            raise LabError(f"{program} is not on this machine")
        paths.add(os.path.realpath(found))
        text = subprocess.run(["ldd", found], capture_output=True, text=True, timeout=10, check=False).stdout
        paths.update(word for line in text.splitlines() for word in line.split() if word.startswith("/"))
    members: list[Member] = [
        entry(name) for name in ("usr", "usr/bin", "usr/lib", "usr/lib64", "dev", "proc", "sys", "etc")
    ]
    members.append(entry("tmp", mode=0o1777))
    members += [entry("bin", link="usr/bin"), entry("lib", link="usr/lib"), entry("lib64", link="usr/lib64")]
    members.append(entry("etc/passwd", "root:x:0:0:root:/root:/bin/sh\n"))
    made = {"/usr", "/usr/bin", "/usr/lib", "/usr/lib64"}
    for path in sorted(paths):
        folder = os.path.realpath(os.path.dirname(path))
        parts = folder.strip("/").split("/")
        for depth in range(1, len(parts) + 1):
            name = "/" + "/".join(parts[:depth])
            if name not in made:
                made.add(name)
                members.append(entry(name.lstrip("/")))
        real = os.path.realpath(path)
        members.append(entry(f"{folder}/{os.path.basename(path)}".lstrip("/"), Path(real).read_bytes(), mode=0o755))
    names = {os.path.realpath(shutil.which(program) or ""): program for program in programs}
    for real, program in names.items():
        if os.path.basename(real) != program:
            members.append(entry(f"usr/bin/{program}", link=os.path.basename(real)))
    return members


def small_image(
    directory: Path,
    marker: str = "hello",
    compression: str = "gzip",
    payload: int = 4 << 20,
    add: Callable[[ImageLayout, list[Member]], Layer] | None = None,
) -> Image:
    """Three layers, a shell with cat, ls, sha256sum: quick to push, enough to run; whiteouts and links included.

    `/payload` holds `payload` incompressible bytes nobody needs to start, its sha256 is in `/payload.sha256`;
    `/marker` holds `marker`. `add` writes a layer in another form.
    """
    layout = ImageLayout(directory)
    write = add or (lambda layout, members: layout.add_layer(members, compression))
    layers = [write(layout, members) for members in small_layers(marker, payload)]
    return layout.finish(layers, cmd=["sh", "-c", "cat /marker"])


def small_layers(marker: str = "hello", payload: int = 4 << 20) -> list[list[Member]]:
    """Its layers, lowest first."""
    data = _noise(payload, marker)
    bottom: list[Member] = [
        *host_files("dash", "cat", "ls", "sha256sum", "stat", "sleep", "mkdir", "rm", "touch", "ln"),
        entry("usr/bin/sh", link="dash"),
    ]
    middle: list[Member] = [
        entry("payload", data),
        entry("payload.sha256", hashlib.sha256(data).hexdigest()),
        entry("doomed", "x"),
        entry("shadowed"),
        entry("shadowed/below", "hidden"),
        entry("etc"),
        entry("etc/hard", "linked", uid=1000, gid=1000),
        entry("tmp/middle", "x"),  # without its directory, as some builders do
        entry("etc/hard2", kind=tarfile.LNKTYPE, link="etc/hard", uid=1000, gid=1000),
    ]
    top: list[Member] = [
        entry("marker", marker),
        entry(".wh.doomed", ""),
        entry("shadowed"),
        entry("shadowed/.wh..wh..opq", ""),
        entry("shadowed/above", "seen"),
    ]
    return [bottom, middle, top]


def _noise(size: int, seed: str) -> bytes:
    """Reproducible bytes that no codec shrinks."""
    return hashlib.shake_128(seed.encode()).digest(size)


def pause_image(directory: Path) -> Image:
    """A pause container for CRI, compiled here: public ones may be out of reach."""
    source = directory / "pause.c"
    directory.mkdir(parents=True, exist_ok=True)
    source.write_text(
        "#include <signal.h>\n#include <stdlib.h>\n#include <sys/wait.h>\n#include <unistd.h>\n"
        "static void end(int s) { (void)s; _exit(0); }\n"
        "static void reap(int s) { (void)s; while (waitpid(-1, 0, WNOHANG) > 0) {} }\n"
        "int main(void) { signal(SIGTERM, end); signal(SIGINT, end); signal(SIGCHLD, reap); for (;;) pause(); }\n"
    )
    run(["gcc", "-static", "-Os", "-o", directory / "pause", source])
    layout = ImageLayout(directory / "layout")
    layer = layout.add_layer([entry("pause", (directory / "pause").read_bytes(), mode=0o755)])
    return layout.finish([layer], entrypoint=["/pause"])
