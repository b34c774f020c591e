"""nydusify as people run it: images converted registry to registry, compared through our mount and by upstream."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from nydusfs.registry.client import RegistryClient
from tests.lab.images import Image, ImageLayout, entry, fetch_manifest
from tests.lab.paths import ref_bin, shared_dir
from tests.lab.process import free_port, mounts_below
from tests.lab.registry import Registry, find_program
from tests.lab.tokens import TokenServer

pytestmark = pytest.mark.skipif(find_program() is None, reason="docker-registry is not installed")

PREFIX = "containerd.io/snapshot/nydus-"
OCI = "application/vnd.oci.image."
PROGRAM = Path(sys.executable).with_name("nydusify")
CLEAN = {
    "PATH": f"{PROGRAM.parent}:/usr/sbin:/usr/bin:/sbin:/bin",
    "HOME": "/nonexistent",
    "DOCKER_CONFIG": "/nonexistent",
    "PYTHONFAULTHANDLER": "1",
}
CAPABILITY = "\x01\x00\x00\x02\x00\x04" + "\x00" * 14  # cap_net_bind_service=ep; the kernel refuses other lengths


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    with Registry(tmp_path_factory.mktemp("registry")) as running:
        yield running


@pytest.fixture(scope="module")
def image(registry: Registry, tmp_path_factory: pytest.TempPathFactory) -> Image:
    """Three layers, each with another compression; whiteouts, opaque directory, hard links, devices, xattrs."""
    layout = ImageLayout(tmp_path_factory.mktemp("image"))
    noise = b"".join(hashlib.sha256(b"%d" % number).digest() for number in range(100_000))
    bottom = layout.add_layer([
        entry("etc", mode=0o755), entry("etc/passwd", "root:x:0:0\n", mode=0o600), entry("etc/doomed", "x"),
        entry("big", noise), entry("opaque"), entry("opaque/hidden", "h"), entry("opaque/deep"),
        entry("opaque/deep/x", "1"), entry("file-or-dir", "was a file"), entry("empty", ""),
        entry("dev"), entry("dev/null", kind=tarfile.CHRTYPE, mode=0o666, device=(1, 3)),
        entry("dev/pipe", kind=tarfile.FIFOTYPE, mode=0o644), entry("lib", link="usr/lib"), entry("usr"),
        entry("usr/lib"), entry("usr/lib/a b", "blank"), entry("ü", "name"),
    ], "gzip")  # fmt: skip
    middle = layout.add_layer([
        entry("etc"), entry("etc/.wh.doomed", ""), entry("hard1", noise[:70_000], uid=1000, gid=100, mode=0o4755),
        entry("hard2", kind=tarfile.LNKTYPE, link="hard1", uid=1000, gid=100, mode=0o4755),
        entry("xattr", "x", xattrs={"user.note": "hello", "security.capability": CAPABILITY}),
        entry("opaque"), entry("opaque/.wh..wh..opq", ""), entry("opaque/shown", "s"),
    ], "zstd")  # fmt: skip
    top = layout.add_layer([
        entry("file-or-dir"), entry("file-or-dir/now", "a directory"), entry("etc"), entry("etc/passwd", "changed\n"),
        entry("copy", noise[:70_000]),
    ], "none")  # fmt: skip
    built = layout.finish([bottom, middle, top], entrypoint=["/bin/tool"], cmd=["x"])
    built.push(registry.host, "lab/app", "oci")
    return built


def nydusify(
    *arguments: str | Path, env: Mapping[str, str] | None = None, timeout: float = 90
) -> subprocess.CompletedProcess[str]:
    """Our console script, with no login of the developer's; a traceback is always a failure."""
    process = subprocess.Popen(
        [str(PROGRAM), *map(str, arguments)],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**CLEAN, **(env or {})},
    )  # fmt: skip
    try:
        said, errors = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGABRT)  # faulthandler says where it hangs
        said, errors = process.communicate(timeout=20)
        pytest.fail(f"{' '.join(map(str, arguments))} hangs\n{said}\n{errors}")
    assert "Traceback" not in errors, errors
    return subprocess.CompletedProcess(list(map(str, arguments)), process.returncode, said, errors)


def convert(registry: Registry, work: Path, target: str, *flags: str | Path) -> subprocess.CompletedProcess[str]:
    done = nydusify(
        "convert", "--source", f"{registry.host}/lab/app:oci", "--target", f"{registry.host}/lab/{target}",
        "--work-dir", work / "work", *flags,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert not (work / "work").exists(), "the work directory was not there before"
    return done


def check(registry: Registry, work: Path, target: str, *flags: str) -> subprocess.CompletedProcess[str]:
    return nydusify(
        "check", "--source", f"{registry.host}/lab/app:oci", "--target", f"{registry.host}/lab/{target}",
        "--work-dir", work / "output", *flags,
    )  # fmt: skip


def upstream_check(registry: Registry, work: Path, target: str, *flags: str) -> subprocess.CompletedProcess[str]:
    programs = {name: ref_bin(name) for name in ("nydusify", "nydusd", "nydus-image")}
    if not all(programs.values()):
        pytest.skip("interop: no reference programs here")
    wrapper = work / "nydusd"
    wrapper.write_text(f'#!/bin/sh\nexec {programs["nydusd"]} --rlimit-nofile 0 "$@"\n')
    wrapper.chmod(0o755)
    return subprocess.run(
        [str(programs["nydusify"]), "check", "--source", f"{registry.host}/lab/app:oci", "--target",
         f"{registry.host}/lab/{target}", "--source-insecure", "--target-insecure", "--work-dir", str(work / "up"),
         "--nydusd", str(wrapper), "--nydus-image", str(programs["nydus-image"]), *flags],
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=100,
        env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "HOME": str(work), "DOCKER_CONFIG": str(work)},
    )  # fmt: skip


VARIANTS = [
    pytest.param("5", "lz4_block", "0x100000", id="v5-lz4"),
    pytest.param("5", "none", "0x1000", id="v5-none-4k"),
    pytest.param("6", "zstd", "0x100000", id="v6-zstd"),
    pytest.param("6", "lz4_block", "65536", id="v6-lz4-64k"),
    pytest.param("6", "none", "0x1000", id="v6-none-4k"),
]


@pytest.mark.root
@pytest.mark.interop
@pytest.mark.parametrize(("version", "compressor", "chunk"), VARIANTS)
def test_converted_images_pass_both_checks(
    registry: Registry, image: Image, tmp_path: Path, version: str, compressor: str, chunk: str
) -> None:
    target = f"app:{version}-{compressor}-{chunk}"
    convert(registry, tmp_path, target, "--fs-version", version, "--compressor", compressor, "--chunk-size", chunk)
    for flags in ([], ["--no-mount"]):
        done = check(registry, tmp_path, target, *flags)
        assert done.returncode == 0, done.stdout + done.stderr
    assert not mounts_below(tmp_path)
    done = upstream_check(registry, tmp_path, target)
    assert done.returncode == 0, done.stdout + done.stderr


def test_manifest_config_and_metrics(registry: Registry, image: Image, tmp_path: Path) -> None:
    convert(registry, tmp_path, "app:m", "--output-json", tmp_path / "out.json")
    _, manifest = fetch_manifest(registry.host, "lab/app", "m")
    assert manifest["mediaType"] == f"{OCI}manifest.v1+json"
    assert [layer["mediaType"] for layer in manifest["layers"]] == [f"{OCI}layer.nydus.blob.v1"] * 3 + [
        f"{OCI}layer.v1.tar+gzip"]  # fmt: skip
    assert [layer["annotations"] for layer in manifest["layers"]] == [{f"{PREFIX}blob": "true"}] * 3 + [
        {f"{PREFIX}bootstrap": "true", f"{PREFIX}fs-version": "6"}]  # fmt: skip
    notes = manifest["annotations"]
    assert list(notes) == sorted(notes)
    assert notes[f"{PREFIX}source-digest"] == image.manifest.digest
    assert notes[f"{PREFIX}source-reference"] == f"{registry.host}/lab/app:oci"
    assert notes[f"{PREFIX}fs-version"] == "6"
    with RegistryClient(registry.host) as client:
        found = client.manifest("lab/app", "m")
        config = json.loads(client.blob("lab/app", manifest["config"]["digest"], 1 << 20))
    assert found.body == json.dumps(manifest, indent=2).encode()
    source = json.loads(image.config.path.read_text())
    assert config["config"] == source["config"]
    assert config["history"] == [
        *source["history"],
        {"created_by": "Nydus Converter", "comment": "Nydus Bootstrap Layer"},
    ]
    assert config["rootfs"]["diff_ids"][:3] == [layer["digest"] for layer in manifest["layers"][:3]]
    metrics = json.loads((tmp_path / "out.json").read_text())
    assert metrics["SourceImageSize"] == image.blob_bytes + image.config.size
    assert metrics["TargetImageSize"] == sum(layer["size"] for layer in manifest["layers"]) + manifest["config"]["size"]
    assert {"SourcePullElapsed", "ConversionElapsed", "TargetPushElapsed"} < set(metrics)
    assert _prefetch(registry, "m") == [], "no whole-image prefetch unless asked, and this image starts no program"


def _prefetch(registry: Registry, tag: str) -> list[bytes]:
    """Names of the top-level entries in the prefetch table."""
    import gzip
    import io
    import tempfile

    from bootstrap.reader import open_bootstrap

    with RegistryClient(registry.host) as client:
        _, manifest = fetch_manifest(registry.host, "lab/app", tag)
        data = gzip.decompress(client.blob("lab/app", manifest["layers"][-1]["digest"], 1 << 24))
    with tarfile.open(fileobj=io.BytesIO(data)) as archive, tempfile.NamedTemporaryFile() as file:
        member = archive.extractfile("image/image.boot")
        assert member is not None
        file.write(member.read())
        file.flush()
        with open_bootstrap(file.name) as bootstrap:
            wanted = set(bootstrap.prefetch_inodes())
            return [one.name for one in bootstrap.list_dir(bootstrap.root) if one.ino in wanted]


def test_prefetch_is_recorded_when_asked_and_layers_stay_equal(
    registry: Registry, image: Image, tmp_path: Path
) -> None:
    convert(registry, tmp_path, "app:p0")
    convert(registry, tmp_path, "app:p1", "--prefetch-dir", "/etc")
    assert _prefetch(registry, "p1") == [b"etc"]
    blobs = [[layer["digest"] for layer in fetch_manifest(registry.host, "lab/app", tag)[1]["layers"][:-1]]
             for tag in ("p0", "p1")]  # fmt: skip
    assert blobs[0] == blobs[1]


@pytest.mark.parametrize("kind", ["build cache", "local cache"])
def test_second_conversion_skips_known_layers(registry: Registry, image: Image, tmp_path: Path, kind: str) -> None:
    flags: list[str | Path] = (
        ["--build-cache", f"{registry.host}/lab/cache:one"]
        if kind == "build cache"
        else ["--cache-dir", tmp_path / "cache"]
    )
    first = convert(registry, tmp_path, "first:1", *flags)
    assert "(cached 0/3)" in first.stderr
    mark = registry.mark()
    second = convert(registry, tmp_path, "second:1", *flags)
    assert "(cached 3/3)" in second.stderr
    sources = {layer.blob.digest for layer in image.layers}
    traffic = registry.since(mark)
    assert not [one for one in traffic.blobs().requests if one.path.rpartition("/")[2] in sources]
    assert fetch_manifest(registry.host, "lab/first", "1") == fetch_manifest(registry.host, "lab/second", "1")
    other = convert(registry, tmp_path, "third:1", *flags, "--fs-version", "5")
    assert "(cached 0/3)" in other.stderr, "made with other settings"
    if kind == "local cache":
        for blob in (tmp_path / "cache").glob("*/blob"):
            with blob.open("r+b") as file:
                file.write(b"damaged!")
        assert "(cached 0/3)" in convert(registry, tmp_path, "fourth:1", *flags).stderr


@pytest.mark.interop
def test_build_caches_work_in_both_directions(registry: Registry, image: Image, tmp_path: Path) -> None:
    program, builder = ref_bin("nydusify"), ref_bin("nydus-image")
    if program is None or builder is None:
        pytest.skip("interop: no reference programs here")

    repository = f"{registry.host}/lab/plain"

    def upstream(target: str, cache: str) -> str:
        # upstream finds a cache only in the source's own repository
        done = subprocess.run(
            [str(program), "convert", "--nydus-image", str(builder), "--source", f"{repository}:oci", "--target",
             f"{repository}:{target}", "--source-insecure", "--target-insecure", "--work-dir", str(tmp_path / "w"),
             "--build-cache", f"{repository}:{cache}", "--build-cache-insecure"],
            stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=100,
            env={"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "DOCKER_CONFIG": str(tmp_path)},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stderr

    layout = ImageLayout(tmp_path / "image")  # gzip only: upstream's builder takes no other compression here
    layers = [layout.add_layer([entry(f"f{number}", f"{number}" * 5000)]) for number in range(2)]
    layout.finish(layers).push(registry.host, "lab/plain", "oci")

    def ours(target: str, cache: str) -> str:
        done = nydusify(
            "convert", "--source", f"{repository}:oci", "--target", f"{repository}:{target}",
            "--work-dir", tmp_path / "work", "--build-cache", f"{repository}:{cache}",
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stderr

    upstream("u1", "theirs")
    assert "(cached 2/2)" in ours("o1", "theirs")
    ours("o2", "ours")
    assert "(cached 2/2)" in upstream("u2", "ours")


def test_platforms_and_merged_index(registry: Registry, image: Image, tmp_path: Path) -> None:
    with RegistryClient(registry.host) as client:
        entries: list[dict[str, Any]] = []
        for architecture in ("amd64", "arm64"):
            layout = ImageLayout(tmp_path / architecture)
            shared = layout.add_layer([entry("shared", "both")])
            own = layout.add_layer([entry("arch", architecture)])
            built = layout.finish([shared, own], architecture=architecture)
            built.push(registry.host, "lab/multi", architecture)
            entries.append({**built.manifest.descriptor(), "platform": {"os": "linux", "architecture": architecture}})
        index = {"schemaVersion": 2, "mediaType": f"{OCI}index.v1+json", "manifests": entries}
        client.push_manifest("lab/multi", "oci", index["mediaType"], json.dumps(index).encode())

    def run(target: str, *flags: str) -> dict[str, Any]:
        done = nydusify("convert", "--source", f"{registry.host}/lab/multi:oci", "--target",
                        f"{registry.host}/lab/{target}", "--work-dir", tmp_path / "w", *flags)  # fmt: skip
        assert done.returncode == 0, done.stderr
        name, _, tag = target.partition(":")
        manifest: dict[str, Any] = fetch_manifest(registry.host, f"lab/{name}", tag)[1]
        return manifest

    assert "layers" in run("multi:one", "--platform", "linux/arm64"), "one platform needs no index"
    both = run("multi:both", "--all-platforms")
    assert [one["platform"]["architecture"] for one in both["manifests"]] == ["amd64", "arm64"]
    merged = run("elsewhere:merged", "--all-platforms", "--merge-platform")
    artifacts = [one.get("artifactType", "") for one in merged["manifests"]]
    assert artifacts == ["", "", *["application/vnd.nydus.image.manifest.v1+json"] * 2]
    done = nydusify("check", "--target", f"{registry.host}/lab/elsewhere:merged", "--multi-platform", "--source",
                    f"{registry.host}/lab/multi:oci", "--platform", "linux/arm64", "--no-mount", "--work-dir",
                    tmp_path / "o")  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    missing = nydusify("convert", "--source", f"{registry.host}/lab/multi:oci", "--target", f"{registry.host}/lab/x:y",
                       "--platform", "linux/riscv64", "--work-dir", tmp_path / "w")  # fmt: skip
    assert missing.returncode == 1
    assert "linux/riscv64" in missing.stderr and "linux/amd64" in missing.stderr


@pytest.mark.root
@pytest.mark.interop
def test_merged_index_passes_both_checks(registry: Registry, image: Image, tmp_path: Path) -> None:
    convert(registry, tmp_path, "app:merged", "--merge-platform", "--with-referrer")
    ours = check(registry, tmp_path, "app:merged", "--multi-platform")
    assert ours.returncode == 0, ours.stdout + ours.stderr
    theirs = upstream_check(registry, tmp_path, "app:merged", "--multi-platform")
    assert theirs.returncode == 0, theirs.stdout + theirs.stderr


def test_private_registry_with_tokens(image: Image, tmp_path: Path) -> None:
    with (
        TokenServer(tmp_path / "tokens") as tokens,
        Registry(tmp_path / "registry", token_realm=tokens.realm) as private,
    ):
        login = {"DOCKER_CONFIG": str(tokens.docker_config(tmp_path / "docker", private.host))}
        _copy_layout(image, private.host, "lab/app", "oci", tokens)
        source, target = f"{private.host}/lab/app:oci", f"{private.host}/lab/app:nydus"
        arguments = ("convert", "--source", source, "--target", target, "--work-dir", tmp_path / "w")
        refused = nydusify(*arguments)
        assert refused.returncode == 1
        assert "authentication required" in refused.stderr and private.host in refused.stderr
        done = nydusify(*arguments, env=login)
        assert done.returncode == 0, done.stderr
        assert tokens.password not in done.stderr
        flags = () if os.geteuid() == 0 and os.path.exists("/dev/fuse") else ("--no-mount",)
        checked = nydusify(
            "check", "--source", source, "--target", target, "--work-dir", tmp_path / "o", *flags, env=login
        )
        assert checked.returncode == 0, checked.stdout + checked.stderr
        assert not list((tmp_path / "o").rglob("nydusd.json")), "it held the password"
        (tmp_path / "docker" / "config.json").write_text(
            json.dumps({"auths": {private.host: {"username": "robot", "password": "nope"}}})
        )
        wrong = nydusify(*arguments, env=login)
        assert wrong.returncode == 1 and "wrong credentials" in wrong.stderr


def _copy_layout(image: Image, host: str, repository: str, tag: str, tokens: TokenServer) -> None:
    from nydusfs.registry.credentials import Credentials

    with RegistryClient(host, credentials=lambda: Credentials(tokens.user, tokens.password)) as client:
        for blob in [*(layer.blob for layer in image.layers), image.config]:
            client.push_file(repository, blob.digest, blob.path)
        client.push_manifest(repository, tag, image.manifest.media_type, image.manifest.path.read_bytes())


# -- trouble


def _failed(done: subprocess.CompletedProcess[str], *said: str) -> None:
    lines = [line for line in done.stderr.splitlines() if line.startswith("nydusify: error:")]
    assert done.returncode == 1 and len(lines) == 1, done.stderr
    for text in said:
        assert text in lines[0]


def test_errors_are_one_line(registry: Registry, image: Image, tmp_path: Path) -> None:
    def run(
        source: str, target: str = f"{registry.host}/lab/t:1", *flags: str | Path
    ) -> subprocess.CompletedProcess[str]:
        return nydusify("convert", "--source", source, "--target", target, "--work-dir", tmp_path / "w", *flags)

    good = f"{registry.host}/lab/app:oci"
    dead = f"127.0.0.1:{free_port()}"
    _failed(run(f"{dead}/a/b:c"), dead, "cannot be reached")
    _failed(run(good, f"{dead}/a/b:c", "--push-retry-count", "0"), dead, "cannot be reached")
    _failed(run(f"{registry.host}/lab/app:none"), "lab/app:none", "does not exist")
    _failed(run("Not A Reference"), "Not A Reference")
    _failed(run(good, good + "@sha256:" + "0" * 64), "digest")
    _failed(run(good, f"{registry.host}/lab/t:1", "--work-dir", "/dev/null/x"), "/dev/null/x", "--work-dir")
    convert(registry, tmp_path, "app:nydus")
    _failed(run(f"{registry.host}/lab/app:nydus"), "Nydus image already")
    assert fetch_status(registry, "lab/t", "1") is None, "nothing that failed was tagged"


def fetch_status(registry: Registry, repository: str, tag: str) -> str | None:
    with RegistryClient(registry.host) as client:
        return client.manifest_digest(repository, tag)


def test_damaged_layers_are_named(registry: Registry, tmp_path: Path) -> None:
    layout = ImageLayout(tmp_path / "image")
    good = layout.add_layer([entry("a", "1" * 100_000)])
    cut = layout.add_blob(good.blob.path.read_bytes()[:-40], good.blob.media_type)
    noise = layout.add_blob(b"\x1f\x8b\x08" + bytes(500), good.blob.media_type)
    for name, blob in {"cut": cut, "noise": noise}.items():
        layer = type(good)(blob, good.diff_id, 0, 0, 0, 0)
        layout.finish([layer]).push(registry.host, "lab/damaged", name)
        done = nydusify("convert", "--source", f"{registry.host}/lab/damaged:{name}", "--target",
                        f"{registry.host}/lab/damaged:out", "--work-dir", tmp_path / "w")  # fmt: skip
        _failed(done, blob.digest, "layer")
    assert fetch_status(registry, "lab/damaged", "out") is None


@pytest.mark.root
def test_check_finds_what_differs(registry: Registry, image: Image, tmp_path: Path) -> None:
    layout = ImageLayout(tmp_path / "image")
    one = layout.finish(
        [layout.add_layer([entry("a", "right"), entry("b", "1", mode=0o600), entry("c", "1")])], cmd=["x"]
    )
    one.push(registry.host, "lab/differs", "one")
    two = layout.finish([layout.add_layer([entry("a", "wrong"), entry("b", "1"), entry("d", "1")])], cmd=["x"])
    two.push(registry.host, "lab/differs", "two")
    name = f"{registry.host}/lab/differs"
    done = nydusify("convert", "--source", f"{name}:two", "--target", f"{name}:nydus", "--work-dir", tmp_path / "w")
    assert done.returncode == 0, done.stderr
    for flags in ([], ["--no-mount"]):
        done = nydusify(
            "check", "--source", f"{name}:one", "--target", f"{name}:nydus", "--work-dir", tmp_path / "o", *flags
        )
        assert done.returncode == 1
        assert [line.split(":")[0] for line in sorted(done.stdout.splitlines())] == ["/a", "/b", "/c", "/d"]
        assert "4 differences" in done.stderr
    plain = nydusify("check", "--target", f"{name}:one", "--work-dir", tmp_path / "o")
    assert plain.returncode == 1 and "not a Nydus image" in plain.stdout
    gone = nydusify("check", "--source", f"{name}:one", "--target", f"{name}:nydus", "--work-dir", tmp_path / "o",
                    "--nydusd", "/bin/false")  # fmt: skip
    _failed(gone, "nydusd ended with status 1")
    assert not mounts_below(tmp_path)


@pytest.mark.interop
@pytest.mark.root
@pytest.mark.parametrize("name", ["v5", "v6", "index"])
def test_upstream_fixtures_pass_our_check(registry: Registry, tmp_path: Path, name: str) -> None:
    shared = shared_dir()
    if shared is None:
        pytest.skip("interop: no reference fixtures here")
    with RegistryClient(registry.host) as client:
        for layout, tag in (("oci", "oci"), (name, name)):
            root = shared / "fixtures" / "reference" / "oci" / layout
            _push_layout(client, root, "lab/fixture", tag)
    # the merged index was built with batched chunks, whose contents this version cannot read
    more = ["--multi-platform"] if name == "index" else ["--source", f"{registry.host}/lab/fixture:oci"]
    target = f"{registry.host}/lab/fixture:{name}"
    done = nydusify("check", "--target", target, "--work-dir", tmp_path / "o", *more)
    assert done.returncode == 0, done.stdout + done.stderr


def _push_layout(client: RegistryClient, root: Path, repository: str, tag: str) -> None:
    blobs = root / "blobs" / "sha256"
    documents: dict[str, dict[str, Any]] = {}
    for path in blobs.iterdir():
        digest = f"sha256:{path.name}"
        client.push_file(repository, digest, path)
        if path.read_bytes()[:1] == b"{":
            document = json.loads(path.read_bytes())
            if "schemaVersion" in document:
                documents[digest] = document
    for digest, document in sorted(documents.items(), key=lambda item: "manifests" in item[1]):
        kind = f"{OCI}index.v1+json" if "manifests" in document else f"{OCI}manifest.v1+json"
        client.push_manifest(repository, digest, kind, (blobs / digest[7:]).read_bytes())
    top = json.loads((root / "index.json").read_text())["manifests"][0]
    client.push_manifest(repository, tag, top["mediaType"], (blobs / top["digest"][7:]).read_bytes())


@pytest.mark.root
def test_mount_serves_until_it_is_stopped(registry: Registry, image: Image, tmp_path: Path) -> None:
    convert(registry, tmp_path, "app:mounted")
    where = tmp_path / "mnt"
    process = subprocess.Popen(
        [str(PROGRAM), "mount", "--target", f"{registry.host}/lab/app:mounted", "--mount-path", str(where),
         "--work-dir", str(tmp_path / "w")],
        stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=CLEAN,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 40
        while not (where / "etc" / "passwd").exists():
            assert process.poll() is None and time.monotonic() < deadline, "never mounted"
            time.sleep(0.05)
        assert (where / "etc" / "passwd").read_text() == "changed\n"
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=30)
    finally:
        process.kill()
        process.wait(10)
    assert process.returncode in (0, 130) and "Traceback" not in said
    assert not mounts_below(tmp_path) and not where.exists() and not (tmp_path / "w").exists()


@pytest.mark.root
def test_full_work_directory_is_said(registry: Registry, image: Image, tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(small)], check=True, timeout=20)
    try:
        done = nydusify("convert", "--source", f"{registry.host}/lab/app:oci", "--target",
                        f"{registry.host}/lab/t:full", "--work-dir", small / "w")  # fmt: skip
        _failed(done, "No space left", str(small))
        assert not list(small.iterdir())
    finally:
        subprocess.run(["umount", "-l", str(small)], check=True, timeout=20)


def test_interrupt_leaves_nothing(registry: Registry, image: Image, tmp_path: Path) -> None:
    # a target that accepts and never answers holds the conversion in its push
    import socket

    with socket.create_server(("127.0.0.1", 0)) as silent:
        process = subprocess.Popen(
            [str(PROGRAM), "convert", "--source", f"{registry.host}/lab/app:oci", "--target",
             f"127.0.0.1:{silent.getsockname()[1]}/a/b:c", "--plain-http", "--work-dir", str(tmp_path / "w")],
            stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=CLEAN,
        )  # fmt: skip
        try:
            silent.settimeout(40)
            connection, _ = silent.accept()
            with connection:
                process.send_signal(signal.SIGINT)
                process.wait(40)
        finally:
            process.kill()
            _, said = process.communicate(timeout=10)
    assert process.returncode == 130 and "Traceback" not in said, said
    assert not (tmp_path / "w").exists()
