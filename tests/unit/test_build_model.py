"""Random layer stacks through tar -> build -> merge -> reader, against a model of what OCI layering means.

The model is in `tests.lab.layering`. In CI the examples are few and always the same; hours of new ones:
`pytest --hypothesis-profile=long --timeout=0 tests/unit/test_build_model.py`.
"""

from __future__ import annotations

import gzip
import io
import os
import stat
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st

from bootstrap.build import build_directory, build_layer
from bootstrap.check import check_bootstrap
from bootstrap.crypt import generate
from bootstrap.kinds import KINDS
from bootstrap.layout.common import Compressor, Digester
from bootstrap.merge import MergeSource, merge_layers
from bootstrap.options import BuildOptions
from bootstrap.reader import open_bootstrap
from tests.lab.layering import CHUNK, Inode, Layer, Step, Tree, check_image, overlay, stacks
from tests.lab.manifest import FolderReader


def examples(count: int) -> settings:
    """That many in CI, 500 times as many with the profile `long`."""
    slow = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]
    return settings(max_examples=count * settings.default.max_examples // 100, suppress_health_check=slow)


@dataclass(frozen=True)
class Form:
    """How layers are built. Options that do not go together were dropped by `forms`."""

    kind: str
    options: BuildOptions


def _form(
    kind: str, version: int, compressor: Compressor, digester: Digester, toc: bool, threads: int, extra: str
) -> Form:
    if kind != "tar-rafs":
        version, extra = 6, ""
    options = BuildOptions(
        fs_version=version,
        compressor=compressor,
        digester=digester,
        chunk_size=CHUNK,
        inline_meta=kind != "tar-tarfs",
        whiteout_spec="none",
        blob_toc=toc and version == 6 and kind != "tar-tarfs",
        threads=threads,
        aligned_chunk=extra == "aligned" and version == 5,
        batch_size=CHUNK if extra in ("batch", "both") and version == 6 else 0,
        secret=generate() if extra in ("encrypt", "both") and version == 6 else None,
    )
    return Form(kind, KINDS[kind].settle(options))


forms = st.builds(
    _form,
    kind=st.sampled_from(["tar-rafs", "tar-rafs", "tar-rafs", "targz-ref", "tar-tarfs"]),
    version=st.sampled_from([5, 6]),
    compressor=st.sampled_from([Compressor.NONE, Compressor.LZ4_BLOCK, Compressor.ZSTD]),
    digester=st.sampled_from(list(Digester)),
    toc=st.booleans(),
    threads=st.sampled_from([1, 2]),
    extra=st.sampled_from(["", "", "aligned", "batch", "encrypt", "both"]),
)


class Workshop:
    """Layers, blobs and merges of one example, in a directory of its own."""

    def __init__(self, folder: Path, form: Form) -> None:
        self.folder = folder
        self.blobs = folder / "blobs"
        self.blobs.mkdir()
        self.form = form
        self._count = 0

    def path(self) -> Path:
        self._count += 1
        return self.folder / f"{self._count}.boot"

    def layer(self, data: bytes, parent: Path | None = None) -> MergeSource:
        """Build a layer; its bootstrap passed our check."""
        kind, options = KINDS[self.form.kind], self.form.options
        stored = gzip.compress(data, 1, mtime=0) if kind.name == "targz-ref" else data
        out, boot = io.BytesIO(), self.path()
        with kind.open(io.BytesIO(stored)) as source:
            if parent is not None:
                options = replace(options, inline_meta=False, blob_toc=False, whiteout_spec="oci")
            result = build_layer(source, out, options, kind=kind, parent=str(parent) if parent else None)
        boot.write_bytes(result.bootstrap)
        with open_bootstrap(boot) as image:
            check_bootstrap(image)
            own = image.blobs[-1].id if image.blobs and result.chunk_count else ""
        if not options.inline_meta:
            (self.blobs / (own or "none")).write_bytes(stored if kind.name == "tar-tarfs" else out.getvalue())
            return MergeSource(boot, original_blob_id=own or None)
        (self.blobs / result.blob_sha256).write_bytes(out.getvalue())
        if kind.name != "targz-ref":
            return MergeSource(boot, blob_digest=result.blob_sha256)
        (self.blobs / (own or "none")).write_bytes(stored)
        return MergeSource(boot, result.blob_sha256, own or None, len(out.getvalue()))

    def merge(self, sources: Sequence[MergeSource], parent: Path | None = None) -> Path:
        out = self.path()
        merge_layers(sources, out, parent=parent)
        return out

    def check(self, boot: Path, expected: Tree) -> None:
        with open_bootstrap(boot) as image:
            check_bootstrap(image)
            check_image(image, FolderReader(image, self.blobs), expected)
            files = [entry.ino for _, entry in image.walk() if entry.dtype == 8]
            used = {ref.blob_index for ino in files for ref in image.chunk_refs(ino)}
            assert used == set(range(len(image.blobs)))


@contextmanager
def workshop(form: Form) -> Iterator[Workshop]:
    with tempfile.TemporaryDirectory() as name:
        yield Workshop(Path(name), form)


_PLAIN = Inode(0, 0o644, content=b"1")
_FORM = {"version": 6, "compressor": Compressor.NONE, "digester": Digester.BLAKE3, "toc": False, "threads": 1}


@examples(120)
@given(plans=stacks, form=forms)
@example([[Step((), b"a", "file", _PLAIN)]], _form("tar-rafs", extra="both", **_FORM))  # one short batch, encrypted
@example(  # a tarfs layer says what it only implies
    [[Step((b"a",), b"b", "dir", _PLAIN)], [Step((b"a", b"b"), b"c", "file", _PLAIN)]],
    _form("tar-tarfs", extra="", **_FORM),
)
def test_layers_become_the_image_a_container_sees(plans: list[list[Step]], form: Form) -> None:
    stack = [Layer(plan) for plan in plans]
    with workshop(form) as shop:
        shop.check(shop.merge([shop.layer(layer.data) for layer in stack]), overlay(stack))


@examples(40)
@given(plans=stacks, form=forms, cuts=st.sets(st.integers(1, 3)))
def test_merging_in_steps_is_merging_at_once(plans: list[list[Step]], form: Form, cuts: set[int]) -> None:
    """From below: what is merged already is the parent of the rest. The same bytes, and again once more."""
    stack = [Layer(plan) for plan in plans]
    with workshop(form) as shop:
        sources = [shop.layer(layer.data) for layer in stack]
        whole = shop.merge(sources).read_bytes()
        borders = [0, *sorted(cut for cut in cuts if cut < len(sources)), len(sources)]
        image: Path | None = None
        for first, last in pairwise(borders):
            image = shop.merge(sources[first:last], parent=image)
        assert image is not None and image.read_bytes() == whole
        nothing = shop.layer(Layer([]).data)
        assert shop.merge([nothing], parent=image).read_bytes() == whole


@examples(30)
@given(plans=stacks, form=forms)
def test_upper_layers_without_whiteouts_may_be_merged_first(plans: list[list[Step]], form: Form) -> None:
    """From above only where no upper layer takes anything away: what it would take is not there yet."""
    stack = [Layer(plans[0]), *(Layer(plan, upstream=True, whiteouts=False) for plan in plans[1:])]
    kinds: dict[tuple[bytes, ...], set[bool]] = {}
    for layer in stack:
        for path, inode in layer.tree.items():
            kinds.setdefault(path, set()).add(inode.is_dir)
    assume(all(len(found) == 1 for found in kinds.values()))  # no directory replaces a file, nor the reverse
    with workshop(form) as shop:
        sources = [shop.layer(layer.data) for layer in stack]
        if len(sources) < 2:
            return
        upper = shop.merge(sources[1:])
        lower = shop.merge(sources[:1])
        merged = shop.path()
        with open_bootstrap(upper) as image:
            assume(len(image.blobs) < 2)  # a source has one blob
            own = image.blobs[0].id if image.blobs else None
        merge_layers([MergeSource(upper, original_blob_id=own)], merged, parent=lower)
        shop.check(merged, overlay(stack))


@examples(40)
@given(plans=stacks.filter(lambda plans: len(plans) > 1), form=forms)
def test_a_layer_built_on_its_parent_is_the_image(plans: list[list[Step]], form: Form) -> None:
    """`create --parent-bootstrap`: whiteouts act at once, chunks of the parent are used again.

    Without links: such a build follows those of the parent, as unpacking onto it would; layers alone cannot.
    """
    assume(form.kind == "tar-rafs")
    *below, top = (Layer([step for step in plan if step.kind != "symlink"]) for plan in plans)
    with workshop(form) as shop:
        parent = shop.merge([shop.layer(layer.data) for layer in below])
        boot = shop.layer(top.data, parent).path
        with open_bootstrap(boot) as image:
            check_bootstrap(image)
            check_image(image, FolderReader(image, shop.blobs), overlay([*below, top]))


def _write_directory(tree: Tree, top: bytes) -> None:
    """What an unprivileged user can have on a disk of a layer's tree."""
    done: dict[int, bytes] = {}
    for path, inode in sorted(tree.items()):
        where = b"/".join((top, *path))
        inode.uid, inode.gid, inode.xattrs, inode.implied = os.getuid(), os.getgid(), {}, False
        if id(inode) in done:
            os.link(done[id(inode)], where, follow_symlinks=False)
            continue
        done[id(inode)] = where
        if inode.is_dir:
            os.makedirs(where, exist_ok=True)
        elif inode.kind == stat.S_IFREG:
            Path(os.fsdecode(where)).write_bytes(inode.content)
        elif inode.kind == stat.S_IFLNK:
            os.symlink(inode.content, where)
        else:
            os.mkfifo(where)
    for path, inode in sorted(tree.items(), reverse=True):
        where = b"/".join((top, *path))
        if inode.kind == stat.S_IFLNK:
            inode.mode = 0o777
        else:
            inode.mode |= 0o700 if inode.is_dir else 0o400
            os.chmod(where, inode.mode)
        os.utime(where, (inode.mtime, inode.mtime), follow_symlinks=False)


@examples(40)
@given(plans=stacks, form=forms)
@example(  # the blob of the first layer comes again when nothing of it is left
    [[Step((), b"a", "file", _PLAIN)], [Step((), b"a", "dir", _PLAIN)], [Step((), b"a", "file", _PLAIN)]],
    _form("tar-rafs", extra="", **_FORM),
)
def test_directories_on_their_parent_are_the_image(plans: list[list[Step]], form: Form) -> None:
    """The same from directories: `dir-rafs`, each on the image of those before."""
    assume(form.kind == "tar-rafs")
    options = replace(form.options, inline_meta=False, blob_toc=False, whiteout_spec="oci")
    plain = [[step for step in plan if step.kind not in ("char", "block")] for plan in plans]
    stack = [Layer(plan) for plan in plain]
    with workshop(form) as shop:
        image: Path | None = None
        for number, layer in enumerate(stack):
            top = shop.folder / f"source{number}"
            marks = [(*path[:-1], b".wh." + path[-1]) for path in layer.removed]
            marks += [(*path, b".wh..wh..opq") for path in layer.opaque]
            # A file that came later in the layer may be where the directory of a mark was: it hides what is below too.
            places = {path for path, inode in layer.tree.items() if inode.is_dir}
            shown = {mark: Inode(stat.S_IFREG, 0o644) for mark in marks if mark[:-1] in places}
            _write_directory(layer.tree | shown, os.fsencode(top))
            layer.tree[()].mtime = 0  # a directory build leaves it out (5.1)
            out = io.BytesIO()
            result = build_directory(os.fsencode(top), out, options, parent=str(image) if image else None)
            (shop.blobs / (result.blob_id or "nothing")).write_bytes(out.getvalue())
            image = shop.path()
            image.write_bytes(result.bootstrap)
        assert image is not None
        with open_bootstrap(image) as opened:
            check_bootstrap(opened)
            check_image(opened, FolderReader(opened, shop.blobs), overlay(stack))
