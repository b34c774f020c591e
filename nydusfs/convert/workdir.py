"""The working directory of one run."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nydusfs.errors import ConvertError, os_reason
from nydusfs.trees import remove_tree


@contextmanager
def work_folder(root: Path) -> Iterator[Path]:
    """A fresh folder below the working directory, which is itself removed again only if it was not there before."""
    existed = root.exists()
    try:
        root.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix="nydusify-", dir=root))
    except OSError as error:
        raise ConvertError(
            f"working directory {root} cannot be used: {error.strerror} (choose with --work-dir)"
        ) from error
    try:
        yield folder
    except OSError as error:
        name = error.filename
        if isinstance(name, str | bytes) and not os.fsdecode(name).startswith(str(folder)):
            raise ConvertError(os_reason(error)) from error
        raise ConvertError(f"working directory {folder}: {error.strerror or error} (choose with --work-dir)") from error
    finally:
        remove_tree(folder, ignore_errors=True)
        if not existed:
            try:
                root.rmdir()
            except OSError:
                pass
