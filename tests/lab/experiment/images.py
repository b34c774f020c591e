"""Images like the four of the published experiment, built here: same make-up, sizes and way of starting.

The official node, ruby, python and rust images are Debian, `curl`, the source-control tools and a C tool chain (the
layers of `buildpack-deps`: 229 MB of packages) with a language on top. These are made of the same Debian packages, laid
over each other without their scripts, and are the same size to a few percent. The programs are real and run.
"""

from __future__ import annotations

import json
import os
import shutil
import stat
import sys
import tarfile
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.lab.images import EPOCH, Image, ImageLayout, Layer, Member, entry
from tests.lab.process import LabError, run
from tests.lab.sample import cache_dir, layer_facts, load_image, small_image

VERSION = 1  # raise when a recipe changes: it names the cache

BASE = """apt base-files base-passwd bash bsdutils coreutils dash debconf debian-archive-keyring debianutils diffutils
dpkg e2fsprogs findutils gpgv grep gzip hostname init-system-helpers libc-bin login logsave mawk mount ncurses-base
ncurses-bin passwd perl-base sed sysvinit-utils tar tzdata usr-is-merged util-linux util-linux-extra"""
CURL = "ca-certificates curl gnupg netbase sq wget"
SCM = "git mercurial openssh-client subversion procps"
TOOLS = """autoconf automake bzip2 default-libmysqlclient-dev dpkg-dev file g++ gcc imagemagick libbz2-dev libc6-dev
libcurl4-openssl-dev libdb-dev libevent-dev libffi-dev libgdbm-dev libglib2.0-dev libgmp-dev libjpeg-dev libkrb5-dev
liblzma-dev libmagickcore-dev libmagickwand-dev libmaxminddb-dev libncurses5-dev libncursesw5-dev libpng-dev libpq-dev
libreadline-dev libsqlite3-dev libssl-dev libtool libwebp-dev libxml2-dev libxslt-dev libyaml-dev make patch unzip
xz-utils zlib1g-dev"""
SHARED = (BASE, CURL, SCM, TOOLS)

DATA_WHEELS = "numpy==2.2.6 pandas==2.2.3 python-dateutil==2.9.0.post0 pytz==2025.2 tzdata==2025.2 six==1.17.0"
WEB_WHEELS = "Django==5.1.4 asgiref==3.8.1 sqlparse==0.5.3"
NODE_WHEEL = "nodejs-bin==18.4.0a4"


@dataclass(frozen=True, slots=True)
class Recipe:
    """`packages`: Debian's, one layer each, over the shared four; `wheels`: from PyPI, one layer each."""

    packages: tuple[str, ...] = ()
    wheels: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Case:
    """One program of one image; `says` is what its output must begin with."""

    name: str
    image: str
    command: tuple[str, ...]
    says: str


RECIPES = {
    "node": Recipe(wheels=(NODE_WHEEL,)),
    "ruby": Recipe(packages=("ruby-full",)),
    "python": Recipe(packages=("python3-full",), wheels=(DATA_WHEELS, WEB_WHEELS)),
    "rust": Recipe(packages=("rustc cargo",)),
}
_IMPORTS = "import numpy, pandas, django; print(numpy.__version__, pandas.__version__, django.__version__)"
CASES = (
    Case("node", "node", ("node", "--version"), "v18."),
    Case("ruby", "ruby", ("ruby", "--version"), "ruby 3."),
    Case("python", "python", ("python3", "-V"), "Python 3.11"),
    Case("rust", "rust", ("rustc", "--version"), "rustc 1."),
    Case("python-imports", "python", ("python3", "-c", _IMPORTS), "2.2.6 2.2.3 5.1.4"),
)
# For tests: a few megabytes that start at once.
SMALL = Case("small", "small", ("sh", "-c", "cat /marker /payload.sha256; sha256sum /payload"), "hello")


def build(name: str, scratch: Path, say: Callable[[str], None]) -> Image:
    """From the cache, or made now (all four: three minutes, 400 MB of packages; the small one in `scratch`). LabError
    when packages are not to be had."""
    if name == SMALL.image:
        return small_image(scratch / "small")
    home = cache_dir() / f"experiment-{VERSION}"
    if not (home / name / "layers.json").exists():
        _build_all(home, say)
    return load_image(home / name)


def _build_all(home: Path, say: Callable[[str], None]) -> None:
    part = home.with_name(f"{home.name}.part-{os.getpid()}")
    shutil.rmtree(part, ignore_errors=True)
    try:
        part.mkdir(parents=True)
        say("downloading Debian packages")
        debs = _Debs(part / "debs")
        wanted = [*SHARED, *(words for recipe in RECIPES.values() for words in recipe.packages)]
        debs.fetch(" ".join(wanted).split())
        root, layout = part / "root", ImageLayout(part / "shared")
        tree = _Tree(root)
        tree.skeleton()
        have: set[str] = set()
        shared: list[Layer] = []
        names: list[str] = []
        for words in SHARED:
            names += words.split()
            shared.append(tree.add_packages(debs, have, names, layout))
            say(f"  shared layer {len(shared)}: {shared[-1].blob.size / 1e6:.0f} MB compressed")
        for name, recipe in RECIPES.items():
            _build_one(part, name, recipe, shared, tree, debs, have, names)
            image = load_image(part / name)
            say(f"  {name}: {image.blob_bytes / 1e6:.0f} MB compressed, {image.files:,} files")
        for leftover in ("root", "debs", "shared", "wheels"):
            shutil.rmtree(part / leftover, ignore_errors=True)
        shutil.rmtree(home, ignore_errors=True)
        part.rename(home)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _build_one(
    part: Path,
    name: str,
    recipe: Recipe,
    shared: Sequence[Layer],
    below: _Tree,
    debs: _Debs,
    have: set[str],
    names: Sequence[str],
) -> None:
    layout = ImageLayout(part / name)
    for layer in shared:
        os.link(layer.blob.path, layout.blobs / layer.blob.path.name)
    tree = below.copy(part / f"root-{name}")
    layers, have, names = list(shared), set(have), list(names)
    for words in recipe.packages:
        names += words.split()
        layers.append(tree.add_packages(debs, have, names, layout))
    for words in recipe.wheels:
        layers.append(tree.add_wheels(words.split(), part / "wheels", layout))
    layers.append(layout.add_layer([entry("app"), entry("app/README", f"what {name} runs would be here\n")]))
    command = next(case.command for case in CASES if case.image == name)
    env = ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "PYTHONDONTWRITEBYTECODE=1"]
    image = layout.finish(layers, cmd=command[:1], env=env)
    (part / name / "layers.json").write_text(json.dumps([layer_facts(layer) for layer in image.layers]))
    shutil.rmtree(tree.root)


class _Debs:
    """Debian packages in a folder, chosen by apt as for an empty system."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "partial").mkdir(parents=True)
        self._options = [
            f"-oDir::Cache::archives={folder}",
            "-oDir::State::status=/dev/null",
            "-oDebug::NoLocking=1",
            "-oAPT::Sandbox::User=root",
            "-oAPT::Install-Recommends=false",
            "-oAPT::Install-Suggests=false",
        ]

    def fetch(self, names: Sequence[str]) -> None:
        run(["apt-get", "-y", "-q", *self._options, "--download-only", "install", *names], timeout=900)

    def closure(self, names: Sequence[str]) -> list[str]:
        """Packages that are installed when `names` are asked for."""
        text = run(["apt-get", "-s", *self._options, "install", *names], timeout=600).stdout
        return [line.split()[1] for line in text.splitlines() if line.startswith("Inst ")]

    def file(self, package: str) -> Path:
        found = next(self.folder.glob(f"{package}_*.deb"), None)
        if found is None:
            raise LabError(f"apt downloaded no {package}: apt-get update")
        return found


class _Tree:
    """A root directory that grows; what a step added is a layer."""

    def __init__(self, root: Path, seen: dict[str, tuple[int, ...]] | None = None) -> None:
        self.root = root
        self._seen = seen or {}
        self._began = time.time()
        root.mkdir(exist_ok=True)

    def copy(self, root: Path) -> _Tree:
        run(["cp", "-al", self.root, root], timeout=300)
        return _Tree(root, dict(self._seen))

    def skeleton(self) -> None:
        for name in ("bin", "sbin", "lib", "lib64"):
            (self.root / "usr" / name).mkdir(parents=True, exist_ok=True)
            (self.root / name).symlink_to(f"usr/{name}")
        for name in ("dev", "proc", "sys", "etc", "root", "run", "tmp", "var"):
            (self.root / name).mkdir(exist_ok=True)

    def add_packages(self, debs: _Debs, have: set[str], names: Sequence[str], layout: ImageLayout) -> Layer:
        for package in debs.closure(names):
            if package not in have:
                have.add(package)
                run(["dpkg-deb", "-x", debs.file(package), self.root], timeout=600)
        accounts = self.root / "usr/share/base-passwd"
        for name in ("passwd", "group"):
            if (accounts / f"{name}.master").exists() and not (self.root / "etc" / name).exists():
                shutil.copy(accounts / f"{name}.master", self.root / "etc" / name)
        return self._layer(layout)

    def add_wheels(self, names: Sequence[str], folder: Path, layout: ImageLayout) -> Layer:
        # For Debian's Python inside the image, whatever interpreter runs this.
        python = "--python-version 3.11 --implementation cp --abi cp311 --abi abi3 --abi none"
        platforms = "manylinux2014_x86_64 manylinux_2_17_x86_64 manylinux_2_12_x86_64 manylinux2010_x86_64 any"
        options = f"--quiet --no-deps --only-binary :all: {python}".split()
        for platform in platforms.split():
            options += ["--platform", platform]
        own = folder / names[0].partition("=")[0]
        run([sys.executable, "-m", "pip", "download", *options, "--dest", own, *names], timeout=600)
        for wheel in sorted(own.glob("*.whl")):
            with zipfile.ZipFile(wheel) as archive:
                if wheel.name.startswith("nodejs_bin"):
                    _unpack(archive, "nodejs/", self.root / "usr/local")
                else:
                    _unpack(archive, "", self.root / "usr/local/lib/python3.11/dist-packages")
        return self._layer(layout)

    def _layer(self, layout: ImageLayout) -> Layer:
        """What maintainers' scripts would have added too: the loader's cache and compiled Python."""
        run(["ldconfig", "-r", self.root], timeout=600)
        shutil.rmtree(self.root / "var/cache/ldconfig", ignore_errors=True)
        if (self.root / "usr/bin/python3.11").exists():
            compiler = (
                "/usr/bin/python3.11 -m compileall -q /usr/lib/python3.11 /usr/lib/python3 /usr/local/lib/python3.11"
            )
            run(["chroot", self.root, *compiler.split()], timeout=600, check=False)
        return layout.add_layer(list(self._added()))

    def _added(self) -> Iterator[Member]:
        inodes: dict[int, str] = {}
        for folder, folders, files in os.walk(self.root):
            folders.sort()
            for name in sorted([*folders, *files]):
                path = Path(folder, name)
                found = path.lstat()
                inside = str(path.relative_to(self.root))
                is_folder = stat.S_ISDIR(found.st_mode)
                # A folder's time changes with what is put into it.
                mark = (found.st_mode,) if is_folder else (found.st_mode, found.st_size, found.st_mtime_ns)
                if self._seen.get(inside) == mark:
                    continue
                self._seen[inside] = mark
                yield _member(path, inside, found, inodes, self._began)


def _member(path: Path, inside: str, found: os.stat_result, inodes: dict[int, str], began: float) -> Member:
    info = tarfile.TarInfo(inside)
    info.mode = stat.S_IMODE(found.st_mode)
    # What this run made has this run's time: images must be the same whenever they are built.
    info.mtime = int(found.st_mtime) if found.st_mtime < began else EPOCH
    if stat.S_ISDIR(found.st_mode):
        info.type, info.mtime = tarfile.DIRTYPE, EPOCH
    elif stat.S_ISLNK(found.st_mode):
        info.type, info.linkname = tarfile.SYMTYPE, os.readlink(path)
    elif stat.S_ISREG(found.st_mode):
        first = inodes.setdefault(found.st_ino, inside)
        if first != inside:
            info.type, info.linkname = tarfile.LNKTYPE, first
            return info, None
        info.size = found.st_size
        return info, path
    else:
        raise LabError(f"{inside}: what is that?")
    return info, None


def _unpack(archive: zipfile.ZipFile, prefix: str, target: Path) -> None:
    for item in archive.infolist():
        if item.is_dir() or not item.filename.startswith(prefix) or ".data/" in item.filename:
            continue
        name = item.filename[len(prefix) :]
        path = target / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(archive.read(item))
        path.chmod(0o755 if name.startswith("bin/") or ".so" in name else 0o644)
        os.utime(path, (EPOCH, EPOCH))
