"""What a daemon configuration says, whichever of upstream's two languages it was written in.

All dataclasses are frozen. Times are seconds, sizes and rates bytes. Defaults are those of upstream 2.4 except where a
field's comment says otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class ProxyConfig:
    """An HTTP proxy in front of the origin; `url == ""` means none."""

    url: str = ""
    ping_url: str = ""
    # A configuration without a proxy block has nothing to fall back from; inside a block the default is True.
    fallback: bool = False
    check_interval: int = 5
    check_pause_elapsed: int = 300
    use_http: bool = False


@dataclass(frozen=True, slots=True)
class MirrorConfig:
    """One mirror. `host` is a URL of scheme, host and port; a path in it is not used."""

    host: str
    headers: Mapping[str, str] = field(default_factory=dict)
    auth_through: bool = False
    ping_url: str = ""
    health_check_interval: int = 5
    failure_limit: int = 5
    health_check_pause_elapsed: int = 300
    health_keys_given: bool = False  # any of the health keys was written down: the log line then shows them
    ns: bool = False  # ours: name the registry in the query `ns`, as containerd does for the mirrors of its hosts.toml


@dataclass(frozen=True, slots=True)
class ConnectionConfig:
    """The keys shared by every backend that speaks HTTP."""

    scheme: str = "https"
    skip_verify: bool = False
    ca_cert_files: tuple[str, ...] = ()
    timeout: int = 5  # of one request with its body; 0: none
    connect_timeout: int = 5  # 0: none
    retry_limit: int = 0  # further attempts at the origin
    proxy: ProxyConfig = field(default_factory=ProxyConfig)
    mirrors: tuple[MirrorConfig, ...] = ()
    # Ours: requests a second, of the whole node, to an origin whose mirrors or proxy fail, and of retries; 0: no limit.
    origin_rate_limit: int = 100


@dataclass(frozen=True, slots=True)
class RegistryBackend:
    """`host` and `repo` are empty only in a template, which the snapshotter fills in per image."""

    host: str = ""
    repo: str = ""
    auth: str = field(default="", repr=False)  # base64 of user:password
    registry_token: str = field(default="", repr=False)
    blob_url_scheme: str = ""
    blob_redirected_host: str = ""
    hosts_dir: str = "/etc/containerd/certs.d"  # ours: containerd's folder of HOST/hosts.toml; "": not read
    connection: ConnectionConfig = field(default_factory=ConnectionConfig)
    type: str = "registry"


@dataclass(frozen=True, slots=True)
class LocalFsBackend:
    blob_file: str = ""  # one file that serves every blob id
    dir: str = ""
    alt_dirs: tuple[str, ...] = ()
    type: str = "localfs"


@dataclass(frozen=True, slots=True)
class DiskBlob:
    """Where a blob lies on a disk without partition table; bytes."""

    offset: int
    size: int


@dataclass(frozen=True, slots=True)
class LocalDiskBackend:
    """A disk or its image whose GPT partitions are the blobs, or that holds them at the places `blobs` says."""

    device_path: str = ""
    disable_gpt: bool = False
    blobs: Mapping[str, DiskBlob] = field(default_factory=dict)  # ours, with disable_gpt; empty: all of it is one blob
    type: str = "localdisk"


@dataclass(frozen=True, slots=True)
class HttpProxyBackend:
    """`addr` is a URL, below whose `path` the blobs lie by id, or a unix socket that serves one blob at "/"."""

    addr: str = ""
    path: str = ""
    connection: ConnectionConfig = field(default_factory=ConnectionConfig)
    type: str = "http-proxy"


@dataclass(frozen=True, slots=True)
class ObjectBackend:
    """A bucket of an S3 or OSS service; an object's key is `object_prefix` and the blob's id.

    Without keys and `credentials_file` requests are not signed, unless the environment has keys.
    """

    type: str = "s3"  # "s3" or "oss"
    endpoint: str = ""  # host[:port]
    bucket_name: str = ""
    region: str = ""  # s3 only
    access_key_id: str = field(default="", repr=False)
    access_key_secret: str = field(default="", repr=False)
    session_token: str = field(default="", repr=False)  # ours: of temporary credentials
    credentials_file: str = ""  # ours: AWS's ini format, read again when it changes
    object_prefix: str = ""
    part_size: int = 64 * MIB  # of uploads; nydusify's key, its default is 500 MiB
    upload_threads: int = 5
    connection: ConnectionConfig = field(default_factory=ConnectionConfig)


BackendConfig: TypeAlias = RegistryBackend | LocalFsBackend | LocalDiskBackend | HttpProxyBackend | ObjectBackend


@dataclass(frozen=True, slots=True)
class CacheConfig:
    type: str = ""  # "blobcache", "filecache", "fscache", "dummycache" or "": no cache files
    work_dir: str = "."
    # True: cached data is hashed again when read. Data from a source is always verified, whatever this says.
    validate: bool = False
    compressed: bool = False
    limit: int = 0  # bytes that segments may take; 0: as much as there is
    min_free: int = 0  # bytes of the file system to leave free

    @property
    def persistent(self) -> bool:
        return self.type in ("blobcache", "filecache", "fscache")


@dataclass(frozen=True, slots=True)
class PrefetchConfig:
    enable: bool = False
    threads: int = 8  # requests in flight at once
    merging_size: int = MIB
    bandwidth_rate: int = 0  # 0: unlimited; smaller values are obeyed as they are (upstream raises them to 16 MiB/s)
    prefetch_all: bool = True
    learn: bool = True  # record what starts read, fetch it ahead at the next cold one; whether or not `enable`


FsDriver: TypeAlias = Literal["auto", "fuse", "erofs"]


@dataclass(frozen=True, slots=True)
class Config:
    id: str
    backend: BackendConfig
    cache: CacheConfig = field(default_factory=CacheConfig)
    prefetch: PrefetchConfig = field(default_factory=PrefetchConfig)
    mode: str = "direct"
    digest_validate: bool = False  # re-check of cached data only, see CacheConfig.validate
    iostats_files: bool = False
    access_pattern: bool = False
    latest_read_files: bool = False
    enable_xattr: bool = False
    fs_driver: FsDriver | None = None  # ours; None: what the daemon was started with
    amplify_io: int = MIB
    id_mapping: tuple[int, ...] = ()
    external_backends: tuple[Mapping[str, Any], ...] = field(default=(), repr=False)
    version: int = 1  # of the language the text was written in
