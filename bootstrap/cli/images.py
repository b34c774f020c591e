"""Opening the images a command works on, so that what is wrong with one is said with its name."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bootstrap.reader import Bootstrap


@contextmanager
def opened(path: str | Path) -> Iterator[Bootstrap]:
    """The image in a file; a FormatError while it is used names the file. For commands that open several."""
    from bootstrap.errors import FormatError
    from bootstrap.reader import open_bootstrap

    try:
        with open_bootstrap(path) as image:
            yield image
    except FormatError as error:
        raise FormatError(f"{path}: {error.structure}", error.offset, error.message) from error
