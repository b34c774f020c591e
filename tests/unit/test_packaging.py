"""What the packages and the cluster's manifests are made of, judged by the tools that will read them."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from tests.lab.helm import served
from tests.lab.paths import REPO

KUBERNETES = REPO / "examples" / "kubernetes"
PLAIN = ("install.yaml", "uninstall.yaml", "runtimeclass.yaml")
OLDEST, NEWEST = "1.24.0", "1.37.0"


def script(name: str) -> ModuleType:
    """A file of packaging/, which is no package: its name is that of a library."""
    folder = str(REPO / "packaging")
    sys.path.insert(0, folder)
    try:
        spec = importlib.util.spec_from_file_location(f"packaging_{name}", f"{folder}/{name}.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(folder)
    return module


def need(tool: str) -> str:
    """Skips, loudly, where it is not."""
    found = shutil.which(tool)
    if found is None and tool == "helm" and not served():
        pytest.skip("helm: the wheel that tests/run takes it from has none for this machine")
    if found is None:
        pytest.skip(f"{tool} is not installed")
    return found


@pytest.fixture(scope="module")
def man(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("man")
    command = [sys.executable, REPO / "packaging" / "manpages.py", folder]
    subprocess.run(command, check=True, timeout=60, env={"SOURCE_DATE_EPOCH": "1700000000", "PATH": "/usr/bin:/bin"})
    return folder


def test_every_command_has_a_page_that_says_what_help_says(man: Path) -> None:
    names = {path.name for path in man.rglob("*.[18]")}
    wanted = {
        "containerd-nydus-grpc.8",
        "nydusd.8",
        "nydusd-fuse.8",
        "nydus-image-create.1",
        "nydus-image-chunkdict.1",
        "nydusify-convert.1",
        "nydusctl-doctor.1",
        "nydusctl-node-install.1",
        "ctr-remote-images-rpull.1",
    }
    assert wanted <= names
    programs = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]["scripts"]
    assert set(programs) == set(script("manpages").PROGRAMS)
    text = (man / "man1" / "nydusctl-node-install.1").read_text()
    for option in ("--runtime NAME", "-h, --help", "--dry-run"):
        assert f"\\fB{option.replace('-', chr(92) + '-')}\\fR" in text
    assert "2023\\-11\\-14" in text or "2023-11-14" in text


def test_mandoc_has_nothing_to_say_of_the_pages(man: Path) -> None:
    done = subprocess.run([need("mandoc"), "-T", "lint", "-W", "warning", *man.rglob("*.[18]")], capture_output=True,
                          text=True, timeout=60)  # fmt: skip
    assert (done.stdout + done.stderr, done.returncode) == ("", 0)


def test_groff_has_nothing_to_say_of_the_pages(man: Path) -> None:
    done = subprocess.run([need("groff"), "-man", "-ww", "-z", *man.rglob("*.[18]")], capture_output=True, text=True,
                          timeout=60)  # fmt: skip
    assert (done.stdout + done.stderr, done.returncode) == ("", 0)


def test_scripts_are_shell(tmp_path: Path) -> None:
    deb = script("deb")
    texts = {name: getattr(deb, name) for name in ("POSTINST", "PRERM", "POSTRM")}
    texts |= {name: getattr(script("rpm"), name) for name in ("POST", "POSTTRANS", "PREUN", "POSTUN")}
    texts["node.sh"] = (REPO / "packaging" / "node.sh").read_text()
    texts["use-python"] = script("bundle").USE_PYTHON
    for name, text in texts.items():
        done = subprocess.run(["sh", "-n"], input=text, capture_output=True, text=True, timeout=20)
        assert (done.stderr, done.returncode) == ("", 0), name
    done = subprocess.run(
        ["sh", REPO / "packaging" / "node.sh", "frobnicate"], capture_output=True, text=True, timeout=20
    )
    assert done.returncode == 2
    assert done.stderr.startswith("node.sh install|uninstall")


def test_a_link_to_an_installation_that_is_gone_is_replaced(tmp_path: Path) -> None:
    """The script of a pod, whose node has such links below /usr/local/bin; others' programs stay."""
    bundle, links, host = tmp_path / "nydus-py", tmp_path / "links", tmp_path / "host"
    for folder in (bundle / "bin", bundle / "lib/python3.11", links, host, tmp_path / "bin"):
        folder.mkdir(parents=True)
    (bundle / "BUILD").write_text("1")
    for program in (bundle / "bin/use-python", bundle / "bin/nydusctl"):
        program.write_text("#!/bin/sh\n")
        program.chmod(0o755)
    nsenter = tmp_path / "bin/nsenter"
    nsenter.write_text('#!/bin/sh\nwhile [ "$1" != -- ]; do shift; done\nshift\nexec "$@"\n')
    nsenter.chmod(0o755)
    text = (REPO / "packaging/node.sh").read_text().replace("/usr/local/bin", str(links))
    for name, place in (("BUNDLE", bundle), ("HOST", host), ("PLACE", host)):
        text = re.sub(rf"^{name}=.*", f"{name}={place}", text, flags=re.MULTILINE)
    pod = tmp_path / "node.sh"
    pod.write_text(text)
    (links / "nydusctl").symlink_to(tmp_path / "gone")
    (links / "nydusify").write_text("another's")
    environment = {**os.environ, "PATH": f"{tmp_path}/bin:{os.environ['PATH']}"}
    done = subprocess.run(
        ["sh", pod, "now-install"], env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert (links / "nydusctl").resolve() == host / "bundle/bin/nydusctl"
    assert (links / "nydusify").read_text() == "another's"


def test_the_dockerfile_copies_what_is_there_and_builds_what_the_scripts_take() -> None:
    text = (REPO / "packaging" / "Dockerfile").read_text()
    for line in re.findall(r"^COPY (?!--from)(.+)$", text, re.MULTILINE):
        for source in line.split()[:-1]:
            assert (REPO / source).exists(), source
    versions = re.search(r'PYTHONS="(.+)"', text)
    assert versions is not None
    assert versions[1].split()[0] == script("bundle").MINIMUM


@pytest.mark.parametrize("words", [["--python", "2.7", "out"], ["--python", "x", "out"], ["."]])
def test_a_bundle_that_cannot_be_made_is_one_line(words: list[str], tmp_path: Path) -> None:
    command = [sys.executable, REPO / "packaging" / "bundle.py", *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert done.stderr.startswith("bundle.py: ")


def test_commands_work_with_the_oldest_click_that_is_asked_for(tmp_path: Path) -> None:
    """In 8.1, Debian 12's, its types of parameters are no generic: for each command its page is made."""
    code = "import click; click.ParamType.__class_getitem__ = None; import runpy, sys; "
    code += f"sys.argv = ['manpages.py', sys.argv[1]]; runpy.run_path({str(REPO / 'packaging' / 'manpages.py')!r}, "
    code += "run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, timeout=60, cwd=REPO)
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.rglob("nydusify-convert.1"))


def documents(text: str) -> list[dict[str, Any]]:
    return [one for one in yaml.safe_load_all(text) if one is not None]


def validated(objects: list[dict[str, Any]]) -> None:
    validate = pytest.importorskip("kubernetes_validate", reason="kubernetes-validate is not installed")
    for version in ("1.25", "1.30", validate.latest_version()):  # the first and the last that it knows
        for one in objects:
            assert validate.validate(one, version, strict=True) is not None, version


@pytest.mark.parametrize("name", PLAIN)
def test_plain_manifests_are_what_kubernetes_takes(name: str) -> None:
    objects = documents((KUBERNETES / name).read_text())
    assert objects
    validated(objects)


def test_yamllint_has_nothing_to_say() -> None:
    pytest.importorskip("yamllint", reason="yamllint is not installed")
    rules = "{extends: default, rules: {line-length: {max: 130}, document-start: disable, comments: disable}}"
    files = [*(KUBERNETES / name for name in PLAIN), *(KUBERNETES / "chart").glob("*.yaml")]
    done = subprocess.run([sys.executable, "-m", "yamllint", "--strict", "-d", rules, *files], capture_output=True,
                          text=True, timeout=60)  # fmt: skip
    assert (done.stdout + done.stderr, done.returncode) == ("", 0)


def daemonset(objects: list[dict[str, Any]]) -> dict[str, Any]:
    (found,) = (one for one in objects if one["kind"] == "DaemonSet")
    return found


def test_uninstall_is_install_the_other_way_round() -> None:
    there, back = (daemonset(documents((KUBERNETES / name).read_text())) for name in PLAIN[:2])
    container = back["spec"]["template"]["spec"]["containers"][0]
    assert container["args"] == ["uninstall"]
    container["args"] = ["install"]
    assert there == back


def test_the_class_of_the_example_is_what_containerd_looks_for() -> None:
    kind, pod = documents((KUBERNETES / "runtimeclass.yaml").read_text())
    assert kind["handler"] == pod["metadata"]["annotations"]["io.containerd.cri.runtime-handler"]
    assert kind["metadata"]["name"] == pod["spec"]["runtimeClassName"]


def template(*words: str, version: str = "1.30.0") -> list[dict[str, Any]]:
    command = [need("helm"), "template", "nydus", KUBERNETES / "chart", "-n", "nydus-system", "--kube-version", version]
    done = subprocess.run([*command, *words], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return documents(done.stdout)


def bare(one: dict[str, Any]) -> dict[str, Any]:
    """Without what only the chart can know; the configuration as what it says."""
    if one["kind"] == "ConfigMap":
        return {**one, "data": json.loads(one["data"]["config.json"])}
    if one["kind"] == "DaemonSet":
        one["spec"]["template"]["metadata"].pop("annotations", None)
    return one


def test_helm_finds_nothing_wrong_with_the_chart() -> None:
    done = subprocess.run(
        [need("helm"), "lint", "--strict", KUBERNETES / "chart"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_chart_says_what_the_plain_manifests_say() -> None:
    plain = documents((KUBERNETES / "install.yaml").read_text())
    for version in (OLDEST, NEWEST):
        made = template(version=version)
        assert [bare(one) for one in made] == [bare(one) for one in plain if one["kind"] != "Namespace"]
    validated(made)
    away = daemonset(template("--set", "mode=uninstall"))
    assert bare(away) == daemonset(documents((KUBERNETES / "uninstall.yaml").read_text()))


def test_values_of_the_chart_reach_the_command_line() -> None:
    def args(*words: str) -> list[str]:
        found = template(*words)
        validated(found)
        arguments: list[str] = daemonset(found)["spec"]["template"]["spec"]["containers"][0]["args"]
        return arguments

    some = "--set=runtime=nydus,containerd.config=/etc/c.toml,containerd.replace=true,force=true,purge=true"
    assert args(some) == ["install", "--containerd-config", "/etc/c.toml", "--runtime", "nydus", "--replace"]
    assert args(some, "--set=mode=uninstall") == [
        "uninstall",
        "--containerd-config",
        "/etc/c.toml",
        "--force",
        "--purge",
    ]
    made = template(some)
    assert {one["kind"] for one in made} == {"ConfigMap", "DaemonSet", "RuntimeClass"}
    wrong = [need("helm"), "template", KUBERNETES / "chart", "--kube-version", "1.30.0", "--set", "mode=away"]
    done = subprocess.run(wrong, capture_output=True, text=True, timeout=60)
    assert done.returncode != 0
    assert re.search(r"mode'?:? (value )?must be one of .*install.*uninstall", done.stderr), done.stderr
