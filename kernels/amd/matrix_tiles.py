"""Tiles that go from memory straight into the registers that MFMA reads them from, past the LDS.

For a wave of 64 lanes. An operand of MFMA wants 4 (or 8) elements along the product's inner axis in
each lane. Keys have these side by side in memory. Values do not: their inner axis are the tokens.
So a lane reads the same few columns of 4 tokens, 16 bytes each, and takes them for columns
`WIDTH / 16` apart; which columns it calls what does not matter until the result is stored, where
the renaming is undone. Triton left to itself carries every tile through the LDS, which costs the
instructions and holds down how many waves fit a compute unit.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.constexpr_function
def _key_width(dtype):
    """Elements of a head dimension that a lane holds side by side: 16 bytes."""
    return 128 // dtype.primitive_bitwidth


VALUE_WIDTH = gl.constexpr(4)
"""Tokens that a lane holds side by side: as many as MFMA leaves there of its result."""


@gluon.constexpr_function
def scores_layout(VERSION, DEPTH):
    """The result of one wave's MFMAs of 16 x 16 x `DEPTH`: each lane has 4 columns of one row."""
    return gl.amd.AMDMFMALayout(
        version=VERSION, instr_shape=[16, 16, DEPTH], transposed=True, warps_per_cta=[1, 1]
    )


@gluon.constexpr_function
def _powers(start, stop):
    """`start`, doubled while it is below `stop`."""
    found = []
    while start < stop:
        found.append(start)
        start *= 2
    return found


@gluon.constexpr_function
def _values_layout(TOKENS, WIDTH):
    """`[TOKENS, 16, WIDTH / 16]`: in each lane neighbours in memory, then 4 tokens."""
    registers = [[0, 0, i] for i in _powers(1, WIDTH // 16)]
    registers += [[1, 0, 0], [2, 0, 0]] + [[i, 0, 0] for i in _powers(16, TOKENS)]
    lanes = [[0, 1, 0], [0, 2, 0], [0, 4, 0], [0, 8, 0], [4, 0, 0], [8, 0, 0]]
    return gl.DistributedLinearLayout(registers, lanes, [], [], [TOKENS, 16, WIDTH // 16])


@gluon.constexpr_function
def _result_layout(ROWS, WIDTH):
    """`[ROWS, 16, WIDTH / 16]`: where `scores_layout` has them, neighbours in memory first."""
    registers = [[0, 0, i] for i in _powers(1, WIDTH // 16)]
    registers += [[0, 1, 0], [0, 2, 0]] + [[i, 0, 0] for i in _powers(16, ROWS)]
    lanes = [[1, 0, 0], [2, 0, 0], [4, 0, 0], [8, 0, 0], [0, 4, 0], [0, 8, 0]]
    return gl.DistributedLinearLayout(registers, lanes, [], [], [ROWS, 16, WIDTH // 16])


@gluon.jit
def _load(p_base, o_tile, m_tile, MASKED: gl.constexpr):
    if MASKED:
        return gl.amd.cdna3.buffer_load(p_base, o_tile, mask=m_tile, other=0.0)
    return gl.amd.cdna3.buffer_load(p_base, o_tile)


@gluon.jit
def load_queries(
    p_base, stride_query, stride_head, queries, heads,
    START: gl.constexpr, WIDTH: gl.constexpr, DIM: gl.constexpr,
    ROWS: gl.constexpr, HEADS: gl.constexpr, LAYOUT: gl.constexpr,
):  # fmt: skip
    """Columns from `START` on of the first `heads` of `queries` as left operand. `[ROWS, WIDTH]`.

    Rows are `HEADS` heads of one query after the other.
    """
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, LAYOUT, _key_width(p_base.dtype.element_ty))
    o_row = gl.arange(0, ROWS, gl.SliceLayout(1, OPERAND))
    o_column = START + gl.arange(0, WIDTH, gl.SliceLayout(0, OPERAND))
    m_row = (o_row // HEADS < queries) & (o_row % HEADS < heads)
    m_tile = m_row[:, None] & (o_column < DIM)[None, :]
    o_row = o_row // HEADS * stride_query + o_row % HEADS * stride_head
    return _load(p_base, o_row[:, None] + o_column[None, :], m_tile, True)


@gluon.jit
def load_keys(
    p_base, stride, count,
    START: gl.constexpr, WIDTH: gl.constexpr, DIM: gl.constexpr, TOKENS: gl.constexpr,
    MASK_TOKENS: gl.constexpr, LAYOUT: gl.constexpr,
):  # fmt: skip
    """`TOKENS` rows of keys as right operand of `q @ k.T`, 0 from row `count` on if masked.

    `[WIDTH, TOKENS]`.
    """
    OPERAND: gl.constexpr = gl.DotOperandLayout(1, LAYOUT, _key_width(p_base.dtype.element_ty))
    o_token = gl.arange(0, TOKENS, gl.SliceLayout(0, OPERAND))
    o_column = START + gl.arange(0, WIDTH, gl.SliceLayout(1, OPERAND))
    m_tile = ((o_token < count) | (not MASK_TOKENS))[None, :] & (o_column < DIM)[:, None]
    MASKED: gl.constexpr = MASK_TOKENS or START + WIDTH > DIM
    return _load(p_base, o_token[None, :] * stride + o_column[:, None], m_tile, MASKED)


@gluon.jit
def load_values(
    p_base, stride, count,
    START: gl.constexpr, WIDTH: gl.constexpr, DIM: gl.constexpr, TOKENS: gl.constexpr,
    MASK_TOKENS: gl.constexpr, LAYOUT: gl.constexpr,
):  # fmt: skip
    """`TOKENS` rows of values as right operand of `p @ v`, 0 from row `count` on if masked.

    `[TOKENS, WIDTH]`, the columns renamed as `store_result` expects.
    """
    PLACES: gl.constexpr = _values_layout(TOKENS, WIDTH)
    o_token = gl.arange(0, TOKENS, gl.SliceLayout(1, gl.SliceLayout(2, PLACES)))
    o_token = o_token[:, None][:, :, None]
    o_column = START + _columns(WIDTH, PLACES)
    m_tile = ((o_token < count) | (not MASK_TOKENS)) & (o_column < DIM)
    MASKED: gl.constexpr = MASK_TOKENS or START + WIDTH > DIM
    b_tile = _load(p_base, o_token * stride + o_column, m_tile, MASKED)
    b_tile = gl.reshape(gl.permute(b_tile, [0, 2, 1]), [TOKENS, WIDTH])
    return gl.convert_layout(b_tile, gl.DotOperandLayout(1, LAYOUT, VALUE_WIDTH))


@gluon.jit
def store_result(
    p_base, b_tile, stride_query, stride_head, queries, heads,
    START: gl.constexpr, WIDTH: gl.constexpr, DIM: gl.constexpr,
    ROWS: gl.constexpr, HEADS: gl.constexpr,
):  # fmt: skip
    """Store a product of rows as in `load_queries` with `load_values`' tile, columns named back."""
    PLACES: gl.constexpr = _result_layout(ROWS, WIDTH)
    b_tile = gl.reshape(b_tile.to(p_base.dtype.element_ty), [ROWS, WIDTH // 16, 16])
    b_tile = gl.convert_layout(gl.permute(b_tile, [0, 2, 1]), PLACES)
    o_row = gl.arange(0, ROWS, gl.SliceLayout(1, gl.SliceLayout(2, PLACES)))
    o_row = o_row[:, None][:, :, None]
    o_column = START + _columns(WIDTH, PLACES)
    m_tile = (o_row // HEADS < queries) & (o_row % HEADS < heads) & (o_column < DIM)
    o_row = o_row // HEADS * stride_query + o_row % HEADS * stride_head
    gl.amd.cdna3.buffer_store(b_tile, p_base, o_row + o_column, mask=m_tile)


@gluon.jit
def _columns(WIDTH: gl.constexpr, PLACES: gl.constexpr):
    """The column in memory of each place of a `[_, 16, WIDTH / 16]` tile."""
    o_lane = gl.arange(0, 16, gl.SliceLayout(0, gl.SliceLayout(2, PLACES)))
    o_inside = gl.arange(0, WIDTH // 16, gl.SliceLayout(0, gl.SliceLayout(1, PLACES)))
    return o_lane[None, :][:, :, None] * (WIDTH // 16) + o_inside[None, :][:, None, :]


@gluon.jit
def as_left_operand(b_p, dtype: gl.constexpr, ROUNDS_BFLOAT16: gl.constexpr, LAYOUT: gl.constexpr):
    """Finite numbers, not negative, in the type of the values as left operand of `p @ v`.

    Where no instruction rounds to bfloat16, adding half a unit of the last place to the bits does,
    in a third of the instructions of the compiler's way: ties go up, not to even.
    """
    if not ROUNDS_BFLOAT16 and dtype == gl.bfloat16:
        b_bits = (b_p.to(gl.uint32, bitcast=True) + 0x8000) >> 16
        b_p = b_bits.to(gl.uint16).to(gl.bfloat16, bitcast=True)
    else:
        b_p = b_p.to(dtype)
    return gl.convert_layout(b_p, gl.DotOperandLayout(0, LAYOUT, VALUE_WIDTH))
