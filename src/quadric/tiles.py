"""Long rows seen as tiles, so that every product with them is one batched GEMM at the speed of memory.

The methods keep a few rows of ``dim`` columns, ``dim`` in the millions, and only ever do two things with them:
multiply them by a vector (:func:`project`) and add them up (:func:`combine`). Both run out of the cache when the rows
are taken a tile of columns at a time, ``(tiles, rows, width)``: on two CPU cores 9 and 10 ms for 128 rows of a million
columns, against 16 and 17 ms for ``torch.mv``. Rows stored one after the other can be viewed so; rows of half precision
had better be stored so, because they are converted tile by tile. A tile never crosses the border of a block, so one
storage serves one matrix for all columns, one for each tensor, and one for each run of ``block_size`` columns.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

WIDTH = 8192  # columns: a row of a tile is 32 KiB of float32, within a core's first-level cache
SLACK = 1.05  # padding may not lengthen a row by more than this


class Tiles:
    """The cut of ``sum(sizes)`` columns, in consecutive blocks of these sizes, into tiles of one width.

    Args:
        sizes: columns of each block.
        width: columns of a tile; by default as near to 8192 as keeps the padding under five percent.
    """

    def __init__(self, sizes: Sequence[int], width: int | None = None):
        self.sizes = tuple(sizes)
        self.dim = sum(self.sizes)
        self.width = width or self._choose_width()
        self.per_block = [-(-size // self.width) for size in self.sizes]
        self.count = sum(self.per_block)
        self.pads = [tiles * self.width - size for tiles, size in zip(self.per_block, self.sizes, strict=True)]
        self._padded_last = not any(self.pads[:-1])  # only the last block, as in runs of one length
        self._lengths_on: dict[torch.device, Tensor] = {}
        self.one_each = all(tiles == 1 for tiles in self.per_block)

    @classmethod
    def runs(cls, dim: int, block_size: int | None) -> Tiles:
        """``dim`` columns as one block or, with ``block_size``, in blocks of so many, the last one shorter."""
        if block_size is not None and not (isinstance(block_size, int) and block_size >= 1):
            raise ValueError(f"block_size must be an integer of at least 1, got {block_size}: None makes one block")
        if block_size is None or block_size >= dim:
            return cls([dim])
        rest = dim % block_size
        return cls([block_size] * (dim // block_size) + [rest] * (rest > 0), block_size)

    def _choose_width(self) -> int:
        longest = max((*self.sizes, 1))
        candidates = [longest] if longest <= WIDTH else []
        candidates += [width for width in (WIDTH, 4096, 2048, 1024, 512, 256, 128, 64, 32, 16) if width < longest]
        padded = {width: sum(-(-size // width) * width for size in self.sizes) for width in candidates}
        return next((w for w in candidates if padded[w] <= SLACK * self.dim), min(padded, key=padded.__getitem__))

    @property
    def length(self) -> int:
        """Columns with the padding."""
        return self.count * self.width

    def pad(self, v: Tensor) -> Tensor:
        """Vectors ``(..., dim)`` with zeros behind the end of each block, ``(..., length)``."""
        if self._padded_last:
            return torch.nn.functional.pad(v, (0, self.pads[-1])) if self.pads[-1] else v
        blocks = zip(v.split(self.sizes, -1), self.pads, strict=True)
        return torch.cat([part for block, pad in blocks for part in (block, v.new_zeros(*v.shape[:-1], pad))], -1)

    def unpad(self, v: Tensor) -> Tensor:
        """The inverse of :meth:`pad`."""
        if self._padded_last:
            return v[..., : self.dim]
        padded = [size + pad for size, pad in zip(self.sizes, self.pads, strict=True)]
        blocks = zip(v.split(padded, -1), self.sizes, strict=True)
        return torch.cat([block[..., :size] for block, size in blocks], -1)

    def cut(self, v: Tensor) -> Tensor:
        """Padded rows ``(..., length)`` as tiles ``(tiles, ..., width)``: a view."""
        return v.unflatten(-1, (self.count, self.width)).movedim(-2, 0)

    def join(self, tiles: Tensor) -> Tensor:
        """The inverse of :meth:`cut`: ``(tiles, ..., width)`` as ``(..., length)``."""
        return tiles.movedim(0, -2).reshape(*tiles.shape[1:-1], tiles.shape[0] * self.width)

    def read(self, tiles: Tensor, start: int, stop: int) -> Tensor:
        """A copy of the padded columns ``start`` to ``stop`` of ``(tiles, rows, width)``, ``(rows, stop − start)``."""
        first, last = start // self.width, -(-stop // self.width)
        offset = first * self.width
        return self.join(tiles[first:last])[..., start - offset : stop - offset].clone()

    def write(self, tiles: Tensor, start: int, stop: int, columns: Tensor) -> None:
        """Put ``(rows, stop − start)`` back where :meth:`read` took it from."""
        first, last = start // self.width, -(-stop // self.width)
        offset = first * self.width
        held = self.join(tiles[first:last]).clone()
        held[:, start - offset : stop - offset] = columns
        tiles[first:last] = held.unflatten(-1, (last - first, self.width)).movedim(-2, 0)

    def total(self, values: Tensor) -> Tensor:
        """Values of tiles ``(tiles, ...)`` added up over each block, ``(blocks, ...)``, in double precision."""
        values = values.to(wide(values))
        if self.one_each:
            return values
        if len(self.sizes) == 1:
            return values.sum(0, keepdim=True)
        # index_add would do, but its order of summation on a GPU, and so its last bits, change from run to run.
        flat, lengths = values.reshape(self.count, -1), self._lengths(values.device)
        return torch.segment_reduce(flat, "sum", lengths=lengths, axis=0, unsafe=True).view(-1, *values.shape[1:])

    def spread(self, values: Tensor) -> Tensor:
        """Values of blocks ``(blocks, ...)`` handed to each of their tiles, ``(tiles, ...)``."""
        if self.one_each:
            return values
        if len(self.sizes) == 1:
            return values.expand(self.count, *values.shape[1:])
        return values.repeat_interleave(self._lengths(values.device), 0, output_size=self.count)

    def _lengths(self, device: torch.device) -> Tensor:
        if device not in self._lengths_on:  # made once: a copy to a GPU would wait for it at every step
            self._lengths_on[device] = torch.tensor(self.per_block, device=device)
        return self._lengths_on[device]


def wide(tensor: Tensor) -> torch.dtype:
    """The type for sums and small factors: double precision where the device has it."""
    return torch.float32 if tensor.device.type == "mps" else torch.float64


def project(rows: Tensor, v: Tensor) -> Tensor:
    """Inner products ``v rowsᵀ`` tile by tile, ``(tiles, k, width)`` with ``(tiles, rows, width)``, in v's type."""
    out = v.new_empty(*v.shape[:2], rows.shape[1])  # autocast leaves a product alone that is told where to go
    if rows.dtype == v.dtype:
        return torch.bmm(v, rows.mT, out=out)
    step = slab_tiles(rows)
    for slab, v_of_slab, target in zip(slabs(rows, v.dtype), v.split(step), out.split(step), strict=True):
        torch.bmm(v_of_slab, slab.mT, out=target)
    return out


def combine(coefficients: Tensor, rows: Tensor, out: Tensor | None = None) -> Tensor:
    """Sums ``coefficients @ rows`` tile by tile, ``(tiles, k, rows)`` with ``(tiles, rows, width)``."""
    if out is None:
        out = coefficients.new_empty(*coefficients.shape[:2], rows.shape[2])
    if rows.dtype == coefficients.dtype:
        return torch.bmm(coefficients, rows, out=out)
    step = slab_tiles(rows)
    parts = zip(slabs(rows, coefficients.dtype), coefficients.split(step), out.split(step), strict=True)
    for slab, coefficients_of_slab, target in parts:
        torch.bmm(coefficients_of_slab, slab, out=target)
    return out


def remix_(rows: Tensor, coefficients: Tensor) -> None:
    """Replace the first k rows of every tile by ``coefficients @ rows``, ``(tiles, k, rows)``, in place."""
    step, kept = slab_tiles(rows), coefficients.shape[1]
    mixed = _scratch(rows, rows.dtype, min(step, len(rows)), kept)
    for part, coefficients_of_part in zip(rows.split(step), coefficients.split(step), strict=True):
        part[:, :kept] = torch.bmm(coefficients_of_part, part, out=mixed[: len(part)])


def slabs(rows: Tensor, dtype: torch.dtype) -> Iterator[Tensor]:
    """Consecutive tiles of ``rows`` in another type, :func:`slab_tiles` at a time; each overwrites the one before."""
    step = min(slab_tiles(rows), len(rows))
    scratch = _scratch(rows, dtype, step, rows.shape[1])
    for part in rows.split(step):
        yield (scratch if len(part) == step else scratch[: len(part)]).copy_(part)


def slab_tiles(rows: Tensor) -> int:
    """How many tiles are worked on at a time: a cacheful, which also bounds the memory for a copy of them."""
    elements = 2**21 if rows.device.type == "cpu" else 2**26
    return max(1, elements // max(1, rows.shape[1] * rows.shape[2]))


class _Kept(threading.local):
    """Memory on the CPU that is kept: fresh pages from the system cost as much as all the work done in them."""

    def __init__(self) -> None:
        self.by_type: dict[torch.dtype, Tensor] = {}


_kept = _Kept()


def _scratch(rows: Tensor, dtype: torch.dtype, tiles: int, height: int) -> Tensor:
    """Memory ``(tiles, height, width)`` for work on some rows; the next call gives it away again."""
    size = tiles * height * rows.shape[2]
    if rows.device.type != "cpu":
        return rows.new_empty(tiles, height, rows.shape[2], dtype=dtype)
    if dtype not in _kept.by_type or len(_kept.by_type[dtype]) < size:
        with torch.inference_mode(False):  # such tensors could not be written to outside of it
            _kept.by_type[dtype] = torch.empty(size, dtype=dtype, device="cpu")
    return _kept.by_type[dtype][:size].view(tiles, height, rows.shape[2])
