"""YAML and JSON files of Kubernetes, read with bounds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from snapshotter.errors import SettingsError

MAX_FILE = 1 << 20


def load(path: Path, what: str) -> dict[str, Any]:
    """A YAML file that holds one mapping. Raises SettingsError naming it."""
    import yaml  # 30 ms, and only few need it

    try:
        with path.open("rb") as file:
            data = file.read(MAX_FILE + 1)
        if len(data) > MAX_FILE:
            raise SettingsError(f"{what} {path}: is larger than {MAX_FILE} bytes")
        document = yaml.safe_load(data)
    except OSError as error:
        raise SettingsError(f"{what} {path}: cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        where = getattr(error, "problem_mark", None)
        line = f" (line {where.line + 1})" if where else ""
        raise SettingsError(f"{what} {path}: is not YAML{line}") from None
    if not isinstance(document, dict):
        raise SettingsError(f"{what} {path}: expected a mapping")
    return document
