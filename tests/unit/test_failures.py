"""What the log has of reads that failed."""

from __future__ import annotations

from types import SimpleNamespace
from typing import cast

import pytest

from bootstrap.base import Bootstrap
from nydusfs import failures


class _Tree:
    """Counts how often somebody looks for a name."""

    walks = 0

    def walk(self) -> list[tuple[bytes, SimpleNamespace]]:
        self.walks += 1
        return [(b"a/b", SimpleNamespace(ino=7)), (b"c", SimpleNamespace(ino=8))]


def test_one_line_a_blob_in_ten_seconds(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    now = 1000.0
    monkeypatch.setattr(failures, "time", SimpleNamespace(monotonic=lambda: now))
    tree = _Tree()
    said = failures.Failures("img", cast(Bootstrap, tree))
    for ino, blob in ((7, "one"), (8, "one"), (8, "one"), (8, "two"), (9, "")):
        error = said.failed(ino, f"blob {blob} from registry r: refused", blob)
        assert (error.errno, f"blob {blob} from registry r: refused" in str(error)) == (5, True)
    now += 10
    said.failed(8, "blob one from registry r: refused", "one")
    said.failed(8, "blob two from registry r: refused", "two")
    begin = "Failed in reading backend: image img: file"
    assert caplog.messages == [
        f"{begin} /a/b: blob one from registry r: refused: EIO",
        f"{begin} /c: blob two from registry r: refused: EIO",
        f"{begin} inode 9: blob  from registry r: refused: EIO",
        f"{begin} /c: blob one from registry r: refused: EIO; 2 more since this was said last",
        f"{begin} /c: blob two from registry r: refused: EIO",
    ]
    assert tree.walks == 3, "nothing is looked for that is not said"
