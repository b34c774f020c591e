"""All layers of an image at once: files in, layer blobs out, one process a layer."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from bootstrap.errors import BuildError, RafsError
from bootstrap.parallel import WorkerDied, cpu_count, run_jobs

if TYPE_CHECKING:
    from bootstrap.options import BuildOptions, BuildResult


@dataclass(frozen=True, slots=True)
class LayerFile:
    """A layer archive and the blob file it becomes. `kind`: a conversion type with a tar (`kinds.KINDS`)."""

    number: int
    source: Path
    blob: Path
    options: BuildOptions
    kind: str = "tar-rafs"
    threads: int = 1

    @property
    def size(self) -> int:
        return self.source.stat().st_size

    def run(self, report: Callable[[int], None]) -> BuildResult:
        """Raises BuildError that names the file; no half blob is left."""
        from bootstrap.build import build_layer, open_source
        from bootstrap.kinds import KINDS

        kind = KINDS[self.kind]
        options = replace(kind.settle(self.options), threads=self.threads)
        done = False
        try:
            with (
                open_source(str(self.source)) as file,
                kind.open(file) as layer,
                self.blob.open("wb", buffering=1 << 16) as out,
            ):
                result = build_layer(layer, out, options, report, kind=kind)
            done = True
        except RafsError as error:
            raise BuildError(f"{self.source}: {error}") from error
        except OSError as error:
            raise BuildError(f"{self.source}: cannot write {self.blob}: {error.strerror or error}") from error
        finally:
            if not done and self.blob.is_file():
                os.unlink(self.blob)
        return result


def build_layers(
    layers: Sequence[LayerFile], workers: int = 0, report: Callable[[LayerFile, int], None] | None = None
) -> Iterator[tuple[LayerFile, BuildResult]]:
    """Build `layers` in up to `workers` processes (0: one for each CPU); results as they get ready, the largest started
    first. `report` gets uncompressed bytes done. The blobs do not depend on the number of workers. Raises BuildError.
    """
    try:
        yield from run_jobs(
            layers, workers or cpu_count(), report or (lambda layer, count: None), domain=RafsError, failed=BuildError
        )
    except WorkerDied as error:
        raise BuildError(str(error)) from error
