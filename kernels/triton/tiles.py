"""Small device functions that several kernels share."""

from __future__ import annotations

import triton
import triton.language as tl

LARGEST = tl.constexpr(2**31 - 1)
LOG_2 = tl.constexpr(0.6931471805599453)
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def load_rows(
    p_base,
    o_row,
    m_row,
    START: tl.constexpr,
    WIDTH: tl.constexpr,
    DIM: tl.constexpr,
    MASK_ROWS: tl.constexpr,
):
    """Columns `START .. START + WIDTH` of some rows, 0 where masked. `[ROWS, WIDTH]`.

    `o_row` are offsets in elements, not row numbers. Columns from `DIM` on do not exist.
    """
    o_column = START + tl.arange(0, WIDTH)
    p_tile = p_base + o_row[:, None] + o_column[None, :]
    if START + WIDTH > DIM:
        return tl.load(p_tile, mask=m_row[:, None] & (o_column < DIM)[None, :], other=0.0)
    if MASK_ROWS:
        return tl.load(p_tile, mask=m_row[:, None], other=0.0)
    return tl.load(p_tile)


@triton.jit
def store_rows(
    p_base, b_tile, o_row, m_row, START: tl.constexpr, WIDTH: tl.constexpr, DIM: tl.constexpr
):
    """The inverse of `load_rows`; converts to the type that `p_base` points to."""
    o_column = START + tl.arange(0, WIDTH)
    m_tile = m_row[:, None] & (o_column < DIM)[None, :]
    b_tile = b_tile.to(p_base.dtype.element_ty)
    tl.store(p_base + o_row[:, None] + o_column[None, :], b_tile, mask=m_tile)


@triton.jit
def split_row(o_row, T, H):
    """Batch, query and head of rows counted along `[B, T, H]`, as int64 to multiply by strides.

    The division is done in int32, several times faster: there are fewer than 2^31 rows.
    """
    return (o_row // H // T).to(tl.int64), (o_row // H % T).to(tl.int64), (o_row % H).to(tl.int64)


@triton.jit
def dot(b_a, b_b, accumulator):
    """`accumulator + a @ b` in float32, without tf32."""
    return tl.dot(b_a, b_b, accumulator, input_precision="ieee")


@triton.jit
def dot_split(b_a, b_a_rest, b_b, b_b_rest, REST: tl.constexpr, DEPTH: tl.constexpr = 0):
    """`a @ b.T` over a head dimension that is cut in two: `[M, D] x [N, D] -> [M, N]`.

    With a `DEPTH`, pieces of so many columns are a batch of products, which warps share and whose
    results are added up. Without one each warp multiplies all columns of its rows, and needs the
    registers to hold them.
    """
    if DEPTH:
        PIECES: tl.constexpr = max(b_a.shape[1] // DEPTH, 1)
        pieces = tl.dot(*_cut(b_a, b_b, PIECES), input_precision="ieee")
        if not REST:
            return tl.sum(pieces, 0)
        if REST >= 16 * PIECES:
            pieces = tl.dot(*_cut(b_a_rest, b_b_rest, PIECES), pieces, input_precision="ieee")
            return tl.sum(pieces, 0)
        REST_PIECES: tl.constexpr = max(REST // DEPTH, 1)
        rest = tl.dot(*_cut(b_a_rest, b_b_rest, REST_PIECES), input_precision="ieee")
        return tl.sum(pieces, 0) + tl.sum(rest, 0)
    product = tl.dot(b_a, tl.trans(b_b), input_precision="ieee")
    if REST:
        product = tl.dot(b_a_rest, tl.trans(b_b_rest), product, input_precision="ieee")
    return product


@triton.jit
def _cut(b_a, b_b, PIECES: tl.constexpr):
    """The operands of `a @ b.T` as a batch over pieces of the columns."""
    DEPTH: tl.constexpr = b_a.shape[1] // PIECES
    b_a = tl.reshape(b_a, [b_a.shape[0], PIECES, DEPTH])
    b_b = tl.reshape(b_b, [b_b.shape[0], PIECES, DEPTH])
    return tl.permute(b_a, (1, 0, 2)), tl.permute(b_b, (1, 2, 0))


@triton.jit
def find_interval(p_ends, o_index, count, STEPS):
    """How many of the `count` ascending numbers at `p_ends` are at most each index.

    With `p_ends = cu_seqlens + 1` this is the packed sequence a token belongs to; `count` for a
    token past the last. `STEPS` is at least the number of bits of `count`.
    """
    low = tl.zeros_like(o_index)
    high = low + count
    for _ in range(STEPS):
        middle = (low + high) // 2
        m_open = low < high
        m_right = m_open & (tl.load(p_ends + middle, mask=m_open, other=0) <= o_index)
        low = tl.where(m_right, middle + 1, low)
        high = tl.where(m_open & (m_right == 0), middle, high)
    return low


@triton.jit
def tile_extent(b_lower, b_upper, m_valid):
    """Of the intervals of a tile's queries: what some query sees, and what every query sees.

    Returns `(some_lower, some_upper, all_lower, all_upper)`; invalid queries count in neither.
    """
    m_seeing = m_valid & (b_upper > b_lower)
    some_lower = tl.min(tl.where(m_seeing, b_lower, LARGEST), 0)
    some_upper = tl.max(tl.where(m_seeing, b_upper, 0), 0)
    all_lower = tl.max(tl.where(m_valid, tl.where(m_seeing, b_lower, LARGEST), 0), 0)
    all_upper = tl.min(tl.where(m_valid, tl.where(m_seeing, b_upper, 0), LARGEST), 0)
    return some_lower, some_upper, all_lower, all_upper


@triton.jit
def key_spans(b_lower, b_upper, m_valid, BLOCK_N: tl.constexpr):
    """The key rows a query tile walks: `(start, full_start, full_stop, stop)`.

    Every valid query sees all of `full_start .. full_stop - 1`; both are whole tiles away from
    `start`. All four are equal where no query sees anything.
    """
    start, stop, full_start, full_stop = tile_extent(b_lower, b_upper, m_valid)
    start = tl.minimum(start, stop)
    full_start = start + tl.cdiv(tl.minimum(full_start, stop) - start, BLOCK_N) * BLOCK_N
    full_start = tl.minimum(full_start, stop)
    full_stop = tl.minimum(full_stop, stop)
    full_stop = full_start + tl.maximum(full_stop - full_start, 0) // BLOCK_N * BLOCK_N
    return start, full_start, full_stop, stop


@triton.jit
def count_bits(b_bits):
    """How many bits of an int32 or int64 are set."""
    if b_bits.dtype.primitive_bitwidth == 64:
        return count_bits(b_bits.to(tl.int32)) + count_bits((b_bits >> 32).to(tl.int32))
    else:
        b_bits = count_bits_of_four(b_bits)
        b_bits = (b_bits + (b_bits >> 4)) & 0x0F0F0F0F
        return (b_bits * 0x01010101) >> 24


@triton.jit
def count_bits_of_four(b_bits):
    """How many of each four bits are set, in their place."""
    b_bits -= (b_bits >> 1) & 0x55555555
    return (b_bits & 0x33333333) + ((b_bits >> 2) & 0x33333333)


@triton.jit
def any_of(m_tile):
    """Whether anything is true along the first dimension, without a detour through integers."""
    return tl.reduce(m_tile, 0, _or)


@triton.jit
def _or(a, b):
    return a | b


@triton.jit
def named_before(b_block, o_slot):
    """Which entries of each row of `[ROWS, SLOTS]` stand in an earlier slot of it as well."""
    # Comparisons reduce over the first dimension, which lies within a thread.
    m_same = tl.permute(b_block, (1, 0))[:, :, None] == b_block[None, :, :]
    return any_of(m_same & (o_slot[:, None, None] < o_slot[None, None, :]))
