"""Cuts a gzip layer into slices that can be decoded one by one: the making of zran contexts. RAFS format 7.3.

Slices start where upstream's builder starts them, so that contexts and dictionaries are the same bytes. (It decides by
size alone: that a gzip member ended does not begin a slice, whatever 7.3 says.)
"""

from __future__ import annotations

from bootstrap.errors import BuildError
from bootstrap.layout.zran import (
    MAX_COMP_SIZE,
    MAX_OUT_LEN,
    MAX_UNCOMP_SIZE,
    MIN_COMP_SIZE,
    ZranContext,
    pack_context,
)
from bootstrap.original import Border, GzipLayer
from bootstrap.spool import Spool

__all__ = ["SliceMaker"]


class SliceMaker:
    """Cuts the gzip layer `layer` into slices around the chunks that are read from it.

    Call `begin` before and `end` behind the bytes of a chunk. Slices may overlap.
    """

    def __init__(self, layer: GzipLayer) -> None:
        self._layer = layer
        self._done: list[ZranContext] = []
        self.dictionaries = Spool()
        """Those of all slices, one after the other."""
        self._border: Border | None = None  # where the current slice starts
        self._in_len = self._out_len = 0  # of the current slice, to the end of its last chunk
        self._chunk_in = self._chunk_out = 0

    def begin(self, chunk_size: int) -> None:
        """A chunk of up to `chunk_size` bytes starts here."""
        layer = self._layer
        self._chunk_in, self._chunk_out = layer.in_position, layer.out_position
        start, border = self._border, layer.border
        if start is None:
            self._border = border
        elif border is not start and self._is_full(start, chunk_size):
            self._close(start)
            self._border = border
        else:
            return
        self.dictionaries.append(layer.window())

    def _is_full(self, start: Border, chunk_size: int) -> bool:
        compressed = self._chunk_in - start.in_offset
        return (
            compressed >= MAX_COMP_SIZE // 2
            or self._chunk_out - start.out_offset + chunk_size >= MAX_UNCOMP_SIZE
            or (self._in_len > MIN_COMP_SIZE and compressed > 2 * self._in_len)
        )

    def end(self) -> tuple[int, int, int]:
        """The chunk ends here. Its `data` field (slice index, offset in it), compressed offset and size."""
        layer, start = self._layer, self._border
        assert start is not None
        at = layer.in_position
        self._in_len = at - start.in_offset
        self._out_len = layer.out_position - start.out_offset
        if self._out_len > MAX_OUT_LEN:
            raise BuildError(
                f"the layer's gzip data cannot be entered for {self._out_len} bytes before offset {layer.out_position} "
                f"of the tar, more than a slice can hold ({MAX_OUT_LEN}): use a smaller --chunk-size"
            )
        return len(self._done) << 32 | (self._chunk_out - start.out_offset), self._chunk_in, at - self._chunk_in

    def _close(self, start: Border) -> None:
        at, out, byte, bits, dict_size = start
        dict_offset = len(self.dictionaries) - dict_size
        self._done.append(ZranContext(at, out, dict_offset, self._in_len, self._out_len, dict_size, byte, bits))

    def finish(self) -> tuple[bytes, int]:
        """No chunk follows: all contexts, and their number. Behind them belong the `dictionaries`."""
        if self._border is not None:
            self._close(self._border)
            self._border = None
        return b"".join(map(pack_context, self._done)), len(self._done)
