"""What the kernels written for Hopper share: when they run, their tiles, and who works on what.

They are written in Gluon, Triton's lower level: one warp fetches tiles ahead of time with the
tensor memory accelerator (TMA), and two warpgroups issue asynchronous matrix products, so that one
takes exponentials while the other multiplies.

A tile that would reach past the last row that counts is moved to end there, because what lies
behind may belong to another sequence and be anything, NaN too. Only where fewer rows than a tile
count does that reach before the first; the fetching warp then clears those before it hands the
tile over, see `clean_rows`.
"""

from __future__ import annotations

import triton.experimental.gluon as gluon
import triton.experimental.gluon.language as gl
from torch import Tensor
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

TILE = gl.NVMMASharedLayout(128, 16, rank=4)


def queries_and_heads(q: Tensor, kv_heads: int) -> tuple[int, int]:
    """A tile of 128 rows: 64 queries of two heads that share their keys, or 128 of one head.

    Two heads see the same keys: fewer are loaded and masked for nothing.
    """
    return (64, 2) if q.shape[2] // kv_heads % 2 == 0 else (128, 1)


def describe(tensor: Tensor, rows: int, columns: int, heads: int = 1) -> TensorDescriptor | None:
    """`[B, T, H, D]` as tiles of so many tokens, columns and heads; None for no columns."""
    if columns == 0:
        return None
    shape = list(tensor.shape)
    whole = shape[1] * shape[2] * shape[3]
    pairs = zip(shape[:-1], tensor.stride()[:-1], strict=True)
    strides = [whole if size == 1 else stride for size, stride in pairs]
    return TensorDescriptor(tensor, shape, [*strides, 1], [1, rows, heads, columns], TILE)


@gluon.jit
def copy_tile(desc, i_batch, i_row, i_head, COLUMN: gl.constexpr, filled, buffer,
              WIDTH: gl.constexpr, ROWS: gl.constexpr, HEADS: gl.constexpr,
              START: gl.constexpr):  # fmt: skip
    """Start copying `WIDTH` columns, 64 at a time, to the rows from `START` on of `[64, WIDTH]`."""
    box: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=4)
    pieces: gl.constexpr = 64 // (ROWS * HEADS)
    boxes = buffer._reinterpret(buffer.dtype, [pieces * (WIDTH // 64), 1, ROWS, HEADS, 64], box)
    for panel in gl.static_range(WIDTH // 64):
        tma.async_copy_global_to_shared(
            desc, [i_batch, i_row, i_head, COLUMN + panel * 64], filled,
            boxes.index(panel * pieces + START // (ROWS * HEADS)),
        )  # fmt: skip


@gluon.jit
def locate(i_work, where, HEADS: gl.constexpr):
    """Batch, first head, key head and first query of a tile, and the ends of its keys' spans.

    Late tiles come first: where attention is causal they have the most to do.
    """
    tile_first, spans, stride_spans, _, H, G, tiles, total = where
    columns = total // tiles
    i_tile = tiles - 1 - i_work // columns
    i_batch = i_work % columns // (H // HEADS)
    i_head = i_work % columns % (H // HEADS) * HEADS
    first = i_tile * (128 // HEADS)
    if tile_first is not None:
        first = gl.load(tile_first + i_tile)
    p_span = spans + i_batch.to(gl.int64) * stride_spans + i_tile * 4
    start, full_start = gl.load(p_span), gl.load(p_span + 1)
    full_stop, stop = gl.load(p_span + 2), gl.load(p_span + 3)
    return i_tile, i_batch, i_head, i_head // G, first, (start, full_start, full_stop, stop)


@gluon.jit
def count_steps(span, BLOCK: gl.constexpr):
    """How many tiles of a span have to be masked, which come first, and how many there are."""
    start, full_start, full_stop, stop = span
    masked = (full_start - start + BLOCK - 1) // BLOCK + (stop - full_stop + BLOCK - 1) // BLOCK
    return masked, masked + (full_stop - full_start) // BLOCK


@gluon.jit
def tile_of_step(i_step, span, BLOCK: gl.constexpr):
    """First row of a step's tile; the rows `nominal .. end - 1` of it are the step's."""
    start, full_start, full_stop, stop = span
    left = (full_start - start + BLOCK - 1) // BLOCK
    i_right = i_step - left
    i_full = i_right - (stop - full_stop + BLOCK - 1) // BLOCK
    m_left, m_right = i_step < left, i_full < 0
    nominal = gl.where(m_right, full_stop + i_right * BLOCK, full_start + i_full * BLOCK)
    nominal = gl.where(m_left, start + i_step * BLOCK, nominal)
    end = gl.where(m_left, full_start, gl.where(m_right, stop, full_stop))
    return gl.minimum(nominal, stop - BLOCK), nominal, end


@gluon.jit
def next_stage(i_stage, parity, STAGES: gl.constexpr):
    """The stage after this one, and the parity of the barriers there."""
    i_stage += 1
    m_wrap = i_stage == STAGES
    return gl.where(m_wrap, 0, i_stage), gl.where(m_wrap, parity ^ 1, parity)


@gluon.jit
def note(words, i_word, number, WARPS: gl.constexpr):
    """Write a single number to shared memory."""
    lanes: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
    words.index(i_word).store(gl.full([1], number, words.dtype, lanes))


@gluon.jit
def noted(words, i_word, WARPS: gl.constexpr = 4):
    """A single number in shared memory."""
    lanes: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
    return gl.max(words.index(i_word).load(lanes), 0)


@gluon.jit
def clean_rows(tile, count):
    """Clear the first `count` rows of a tile in shared memory, before others are told of it.

    For the fetching warp, once the tile is there.
    """
    rows: gl.constexpr = tile.shape[1]
    width: gl.constexpr = tile.shape[3]
    layout: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=2)
    lanes: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [1, 1], [1, 0])
    flat = tile._reinterpret(tile.dtype, [rows, width], layout)
    for i_row in gl.static_range(0, rows, 8):
        if i_row < count:
            o_row = i_row + gl.arange(0, 8, gl.SliceLayout(1, lanes))
            for i_column in gl.static_range(0, width, 64):
                part = flat.slice(i_row, 8).slice(i_column, 64, 1)
                b_part = gl.where((o_row >= count)[:, None], part.load(lanes), 0.0)
                part.store(b_part.to(tile.dtype))
    fence_async_shared()
    gl.thread_barrier()
