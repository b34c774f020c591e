"""Reading both of upstream's configuration languages: version 1 (JSON) and version 2 (TOML or JSON).

The rules are those of `api/src/config.rs`: a text of at most 1 MiB, `version = 2` marks the second language, unknown
keys never stop anything (here they are named once, upstream is silent).
"""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any, cast

from nydusfs.config.amount import parse_amount
from nydusfs.config.backends import KINDS, parse_backend
from nydusfs.config.model import MIB, BackendConfig, CacheConfig, Config, FsDriver, PrefetchConfig
from nydusfs.config.section import Section
from nydusfs.errors import ConfigError, os_reason

MAX_TEXT = MIB
MAX_BATCH = 0x1000_0000
MAX_THREADS = 1024
_PLAIN = "what is cached is plain data, so that no read has to decompress it"
_NOT_ENCRYPTED = "what is cached is plain data; put work_dir on an encrypted disk"
_STREAM = "prefetch asks for ranges, through Dragonfly too, and keeps what it gets"
_CACHE_TYPES = ("", "blobcache", "filecache", "fscache", "dummycache")


def load_config(text: str, where: str, *, template: bool = False) -> Config:
    """Parse a daemon configuration.

    `where` names the file (or API call) in errors and warnings. With `template` the registry's host and repository
    may be missing: that is the snapshotter's `/etc/nydus/config.json`.
    Raises `ConfigError` naming the key path, the value and what was expected.
    """
    if len(text) > MAX_TEXT:
        raise ConfigError("", f"is larger than {MAX_TEXT} bytes", where)
    document = _parse(text, where)
    root = Section(document, "", where)
    if document.get("version") == 2:
        config = _version2(root, template)
    elif "version" in document and "device" not in document:
        raise root.error("version", f"{document['version']!r} is not supported, expected 2")
    else:
        config = _version1(root, template)
    root.warn_unknown()
    return config


def load_backend(kind: str, text: str, where: str) -> BackendConfig:
    """A backend's table alone, as JSON: `--backend-type` and `--backend-config` of the tools. Raises `ConfigError`."""
    if len(text) > MAX_TEXT:
        raise ConfigError("", f"is larger than {MAX_TEXT} bytes", where)
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError("", f"is not valid JSON: {error}", where) from None
    return parse_backend(Section({"type": kind}, "", where), kind, Section(document, "", where), False)


def _parse(text: str, where: str) -> dict[str, Any]:
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as json_error:
        if text.lstrip()[:1] in ("{", "["):
            raise ConfigError("", f"is not valid JSON: {json_error}", where) from None
        import tomllib  # 4 ms that a start without such a file does without

        try:
            return tomllib.loads(text)
        except (ValueError, RecursionError) as toml_error:
            raise ConfigError("", f"is neither JSON ({json_error}) nor TOML ({toml_error})", where) from None
    if not isinstance(document, dict):
        raise ConfigError("", "expected a table at the top level", where)
    return document


def _version1(root: Section, template: bool) -> Config:
    device = root.section("device")
    if device is None:
        raise root.error("device", "is missing (a version 1 configuration starts with it; version 2 has `version = 2`)")
    backend_section = device.section("backend")
    if backend_section is None:
        raise device.error("backend", "is missing")
    kind = backend_section.text("type")
    options = backend_section.section("config")
    if options is None and not template:
        raise backend_section.error("config", "is missing")
    if kind == "http-proxy":
        raise backend_section.error("type", "'http-proxy' needs a version 2 configuration")
    table = options or Section({}, "device.backend.config", root.where)
    backend = parse_backend(backend_section, kind, table, template)
    backend_section.warn_unknown()

    cache = CacheConfig()
    if (section := device.section("cache")) is not None:
        kind = section.text("type")
        cache = _cache(section, kind, section.section("config"))
        section.warn_unknown()

    prefetch = PrefetchConfig()
    if (section := root.section("fs_prefetch")) is not None:
        prefetch = PrefetchConfig(
            enable=section.flag("enable"),
            threads=section.number("threads_count", 8),
            merging_size=section.number("merging_size", MIB, high=MAX_BATCH),
            bandwidth_rate=section.number("bandwidth_rate", 0),
            prefetch_all=section.flag("prefetch_all", True),
            learn=section.flag("learn", True),
        )
        section.without_effect("stream_prefetch", _STREAM)
        _check_threads(section, "threads_count", prefetch)
        section.warn_unknown()

    config_id = device.text("id")
    external = _external(device)
    device.warn_unknown()
    if "mode" not in root and not template:
        raise root.error("mode", "is missing, expected 'direct' or 'cached'")
    config = _rafs(
        root,
        config_id,
        backend,
        cache,
        prefetch,
        external,
        batch_key="amplify_io",
        validate_key="digest_validate",
    )
    root.known("warmup")
    return config


def _version2(root: Section, template: bool) -> Config:
    root.known("version", "overlay", "dedup", "internal", "blobs", "extra")
    backend_section = root.section("backend")
    if backend_section is None:
        raise root.error("backend", "is missing")
    kind = backend_section.text("type")
    inner = backend_section.section(kind) if kind else None
    backend = parse_backend(backend_section, kind, inner or Section({}, f"backend.{kind}", root.where), template)
    backend_section.known(*KINDS)
    backend_section.warn_unknown()

    cache = CacheConfig()
    prefetch = PrefetchConfig(prefetch_all=False)
    if (section := root.section("cache")) is not None:
        kind = section.text("type")
        cache = _cache(section, kind, section.section("fscache" if kind == "fscache" else "filecache"))
        section.known("filecache", "fscache")
        prefetch = _prefetch2(section.section("prefetch")) or prefetch
        section.warn_unknown()

    rafs = root.section("rafs") or Section({}, "rafs", root.where)
    prefetch = _prefetch2(rafs.section("prefetch")) or prefetch
    config = _rafs(
        rafs,
        root.text("id"),
        backend,
        cache,
        prefetch,
        _external(root),
        batch_key="batch_size",
        validate_key="validate",
        version=2,
    )
    rafs.warn_unknown()
    return config


def _prefetch2(section: Section | None) -> PrefetchConfig | None:
    if section is None:
        return None
    prefetch = PrefetchConfig(
        enable=section.flag("enable"),
        threads=section.number("threads", 8),
        merging_size=section.number("batch_size", MIB, high=MAX_BATCH),
        bandwidth_rate=section.number("bandwidth_limit", 0),
        prefetch_all=section.flag("prefetch_all"),
        learn=section.flag("learn", True),
    )
    section.without_effect("stream_prefetch", _STREAM)
    _check_threads(section, "threads", prefetch)
    section.warn_unknown()
    return prefetch


def _check_threads(section: Section, key: str, prefetch: PrefetchConfig) -> None:
    if prefetch.enable and not 1 <= prefetch.threads <= MAX_THREADS:
        raise section.error(key, f"{prefetch.threads} is outside 1..{MAX_THREADS}")


def _external(section: Section) -> tuple[dict[str, Any], ...]:
    value = section.take("external_backends")
    if value is None:
        return ()
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise section.error("external_backends", "expected a list of tables")
    return tuple(value)


def _rafs(
    section: Section,
    config_id: str,
    backend: BackendConfig,
    cache: CacheConfig,
    prefetch: PrefetchConfig,
    external: tuple[dict[str, Any], ...],
    *,
    batch_key: str,
    validate_key: str,
    version: int = 1,
) -> Config:
    mode = section.text("mode", "direct")
    if mode not in ("direct", "cached"):
        raise section.error("mode", f"{mode!r} is not a mode, expected 'direct' or 'cached'")
    return Config(
        id=config_id,
        backend=backend,
        cache=cache,
        prefetch=prefetch,
        mode=mode,
        digest_validate=section.flag(validate_key),
        iostats_files=section.flag("iostats_files"),
        access_pattern=section.flag("access_pattern"),
        latest_read_files=section.flag("latest_read_files"),
        enable_xattr=section.flag("enable_xattr"),
        fs_driver=_fs_driver(section),
        amplify_io=section.number(batch_key, MIB, high=MAX_BATCH),
        id_mapping=_id_mapping(section),
        external_backends=external,
        version=version,
    )


def _cache(section: Section, kind: str, options: Section | None) -> CacheConfig:
    if kind not in _CACHE_TYPES:
        raise section.error("type", f"{kind!r} is not a cache type, expected one of {', '.join(_CACHE_TYPES[1:])}")
    compressed = section.without_effect("compressed", _PLAIN)
    cache = CacheConfig(type=kind, validate=section.flag("validate"), compressed=compressed)
    if options is None:
        return cache
    work_dir = options.text("work_dir", ".")
    if not work_dir:
        raise options.error("work_dir", "is empty")
    limit, floor = _amount(options, "limit", work_dir), _amount(options, "min_free", work_dir)
    options.known("disable_indexed_map", "encryption_key")
    for key in ("enable_encryption", "enable_convergent_encryption"):
        options.without_effect(key, _NOT_ENCRYPTED)
    options.warn_unknown()
    return replace(cache, work_dir=work_dir, limit=limit, min_free=floor)


def _amount(section: Section, key: str, work_dir: str) -> int:
    value = section.take(key)
    if value is None:
        return 0
    try:
        if not isinstance(value, (int, str)) or isinstance(value, bool):
            raise ValueError(value)
        return parse_amount(value, work_dir)
    except (ValueError, OverflowError):
        raise section.error(key, f'{value!r} is not a number of bytes, "20GiB" or "80%" of the disk') from None
    except OSError as error:
        raise section.error(key, f"{value!r} of a disk that cannot be looked at: {os_reason(error)}") from None


def _id_mapping(section: Section) -> tuple[int, ...]:
    """(container id, host id, count) or ()."""
    found = section.numbers("id_mapping")
    if found and (len(found) != 3 or min(found) < 0 or not found[2] or max(found[:2]) + found[2] > 1 << 32):
        raise section.error("id_mapping", f"{list(found)} is not [container id, host id, count] of 32-bit ids")
    return found


def _fs_driver(section: Section) -> FsDriver | None:
    value = section.text("fs_driver")
    if value not in ("", "auto", "fuse", "erofs"):
        raise section.error("fs_driver", f"is '{value}', expected 'auto', 'fuse' or 'erofs'")
    return cast("FsDriver", value) if value else None
