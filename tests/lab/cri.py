"""The calls by which a kubelet runs a container, without a kubelet: containerd's CRI over its own socket."""

from __future__ import annotations

import secrets
import sys
import tempfile
import time
from functools import cache
from pathlib import Path
from typing import Any

import grpc

from tests.lab.process import LabError

_EXITED, _NODE = 2, 2


@cache
def _modules() -> tuple[Any, Any]:
    """Messages and stubs, generated from cri.proto beside this file."""
    from grpc_tools import protoc  # type: ignore[import-untyped]

    folder = tempfile.mkdtemp(prefix="ny-cri-")
    here = Path(__file__).parent
    if protoc.main(
        ["protoc", f"-I{here}", f"--python_out={folder}", f"--grpc_python_out={folder}", str(here / "cri.proto")]
    ):
        raise LabError("protoc refuses cri.proto")
    sys.path.insert(0, folder)
    try:
        import cri_pb2  # type: ignore[import-not-found]
        import cri_pb2_grpc  # type: ignore[import-not-found]
    finally:
        sys.path.remove(folder)
        for path in sorted(Path(folder).rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
        Path(folder).rmdir()
    return cri_pb2, cri_pb2_grpc


class Cri:
    """One pod after another on containerd's socket; `cgroup` names the parent cgroup to remove afterwards.

    `images`: the socket of another image service, as kubelet's --image-service-endpoint.
    """

    def __init__(self, socket: Path, work: Path, images: Path | None = None) -> None:
        self.messages, stubs = _modules()
        # Go servers refuse the escaped socket path that grpc would send as :authority.
        options = [("grpc.default_authority", "localhost")]
        self.channel = grpc.insecure_channel(f"unix://{socket}", options=options)
        self.image_channel = grpc.insecure_channel(f"unix://{images or socket}", options=options)
        self.runtime, self.images = stubs.RuntimeServiceStub(self.channel), stubs.ImageServiceStub(self.image_channel)
        self.logs = work / "pods"
        self.logs.mkdir(exist_ok=True)
        self.cgroup = f"ny{secrets.token_hex(4)}"

    def sandbox(self, runtime: str = "") -> tuple[str, Any]:
        """(id, configuration) of a pod in the host's network; `runtime`: which of containerd's, "" its default."""
        m = self.messages
        options = m.NamespaceOption(network=_NODE)
        config = m.PodSandboxConfig(
            metadata=m.PodSandboxMetadata(name="pod", uid=secrets.token_hex(8), namespace="lab"),
            log_directory=str(self.logs),
            annotations={"io.containerd.cri.runtime-handler": runtime} if runtime else {},
            linux=m.LinuxPodSandboxConfig(
                cgroup_parent=f"/{self.cgroup}",
                security_context=m.LinuxSandboxSecurityContext(namespace_options=options),
            ),
        )
        made = self.runtime.RunPodSandbox(m.RunPodSandboxRequest(config=config, runtime_handler=runtime), timeout=60)
        return made.pod_sandbox_id, config

    def image_call(self, method: str, request: bytes = b"", package: str = "runtime.v1") -> bytes:
        """Any method of the image service, messages as bytes."""
        call = self.image_channel.unary_unary(f"/{package}.ImageService/{method}", None, None)
        answer: bytes = call(request, timeout=120)
        return answer

    def pull_alpha(self, image: str, user: str, password: str) -> str:
        """As kubelets before 1.23 said it."""
        m = self.messages
        auth = m.AuthConfig(username=user, password=password)
        request = m.PullImageRequest(image=m.ImageSpec(image=image), auth=auth)
        answer = self.image_call("PullImage", request.SerializeToString(), "runtime.v1alpha2")
        return str(m.PullImageResponse.FromString(answer).image_ref)

    def pull(self, image: str, config: Any, user: str = "", password: str = "", runtime: str = "") -> str:
        m = self.messages
        auth = m.AuthConfig(username=user, password=password) if user else None
        spec = m.ImageSpec(image=image, runtime_handler=runtime)
        request = m.PullImageRequest(image=spec, auth=auth, sandbox_config=config)
        return str(self.images.PullImage(request, timeout=120).image_ref)

    def start(self, pod: str, config: Any, image_ref: str, *command: str) -> tuple[str, Path]:
        """(id, log file) of a running container of the pod."""
        m = self.messages
        log = f"{secrets.token_hex(4)}.log"
        security = m.LinuxContainerSecurityContext(namespace_options=m.NamespaceOption(network=_NODE))
        container = self.runtime.CreateContainer(
            m.CreateContainerRequest(
                pod_sandbox_id=pod,
                sandbox_config=config,
                config=m.ContainerConfig(
                    metadata=m.ContainerMetadata(name=log[:8]),
                    image=m.ImageSpec(image=image_ref),
                    command=command,
                    log_path=log,
                    linux=m.LinuxContainerConfig(security_context=security),
                ),
            ),
            timeout=60,
        ).container_id
        self.runtime.StartContainer(m.ContainerId(container_id=container), timeout=60)
        return str(container), self.logs / log

    def run(self, pod: str, config: Any, image_ref: str, *command: str) -> tuple[int, str]:
        """(exit code, standard output) of one container of the pod; the container is removed."""
        container, log = self.start(pod, config, image_ref, *command)
        name = self.messages.ContainerId(container_id=container)
        deadline = time.monotonic() + 60
        while (status := self.runtime.ContainerStatus(name, timeout=20).status).state != _EXITED:
            if time.monotonic() > deadline:
                raise LabError(f"container {container} did not end")
            time.sleep(0.05)
        self.runtime.RemoveContainer(name, timeout=60)
        lines = log.read_text().splitlines()
        return status.exit_code, "\n".join(line.split(" ", 3)[3] for line in lines if " stdout " in line)

    def pod_says(self, image: str, *command: str) -> tuple[int, str]:
        """(exit code, standard output) of a pod of one container: sandbox, pull and run as a kubelet does them."""
        pod, config = self.sandbox()
        try:
            return self.run(pod, config, self.pull(image, config), *command)
        finally:
            self.remove(pod)

    def exec(self, container: str, *command: str) -> tuple[int, str]:
        request = self.messages.ExecSyncRequest(container_id=container, cmd=command, timeout=30)
        done = self.runtime.ExecSync(request, timeout=60)
        return done.exit_code, done.stdout.decode()

    def stats(self, container: str) -> Any:
        return self.runtime.ContainerStats(self.messages.ContainerId(container_id=container), timeout=30).stats

    def stop(self, container: str) -> None:
        self.runtime.StopContainer(self.messages.StopContainerRequest(container_id=container, timeout=0), timeout=60)
        self.runtime.RemoveContainer(self.messages.ContainerId(container_id=container), timeout=60)

    def image_filesystem(self) -> Any:
        (found,) = self.images.ImageFsInfo(self.messages.Nothing(), timeout=30).image_filesystems
        return found

    def image(self, name: str) -> Any:
        """None: there is no such image."""
        spec = self.messages.ImageSpec(image=name)
        found = self.images.ImageStatus(self.messages.ImageStatusRequest(image=spec), timeout=30)
        return found.image if found.HasField("image") else None

    def remove(self, pod: str) -> None:
        name = self.messages.PodSandboxId(pod_sandbox_id=pod)
        self.runtime.StopPodSandbox(name, timeout=60)
        self.runtime.RemovePodSandbox(name, timeout=60)

    def remove_image(self, image: str) -> None:
        self.images.RemoveImage(
            self.messages.RemoveImageRequest(image=self.messages.ImageSpec(image=image)), timeout=60
        )

    def close(self) -> None:
        self.channel.close()
        self.image_channel.close()
        for folder in Path("/sys/fs/cgroup").glob(f"*/{self.cgroup}"):
            try:
                folder.rmdir()
            except OSError:
                pass
