"""What the kernels for Hopper that go through lists of queries share: reading and writing rows.

The lists are those of `lists.block_lists`; a tile is that of `ROWS // G` entries, whose query's `G`
heads are its rows. 16 bytes are copied at a time.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy


@gluon.jit
def load_work(i_work, starts, counts, segment_ends, work_bins, bins, SEGMENT: gl.constexpr):
    """`lists.load_work`, and the whole length of the bin's list."""
    i_bin = gl.load(work_bins + i_work)
    m_bin = i_bin < bins
    total = gl.load(counts + i_bin, mask=m_bin, other=0)
    segments = (total + SEGMENT - 1) // SEGMENT
    i_segment = i_work - (gl.load(segment_ends + i_bin, mask=m_bin, other=0) - segments)
    start = gl.load(starts + i_bin, mask=m_bin, other=0) + i_segment * SEGMENT
    count = gl.minimum(total - i_segment * SEGMENT, SEGMENT)
    return i_bin, start, gl.where(m_bin, count, 0), total


@gluon.jit
def entry_offsets(
    p_entries, i_entry, count, ROWS: gl.constexpr, G: gl.constexpr, DIM: gl.constexpr,
    LAYOUT: gl.constexpr,
):  # fmt: skip
    """A tile's entries, those past the list's end being its last, and offsets along its axes."""
    ENTRIES: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(2, LAYOUT))
    MEMBERS: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(2, LAYOUT))
    COLUMNS: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(1, LAYOUT))
    o_entry = i_entry + gl.arange(0, ROWS // G, layout=ENTRIES)
    b_entry = gl.load(p_entries + gl.minimum(o_entry, count - 1))
    o_member = gl.expand_dims(gl.expand_dims(gl.arange(0, G, layout=MEMBERS), 0), 2)
    o_column = gl.expand_dims(gl.expand_dims(gl.arange(0, DIM, layout=COLUMNS), 0), 1)
    return o_entry, b_entry, o_member, o_column


@gluon.jit
def copy_rows(
    s_rows, p_base, p_entries, i_entry, count, stride_t, stride_h, SLOTS: gl.constexpr,
    G: gl.constexpr, WIDTH: gl.constexpr, LAYOUT: gl.constexpr, CLOSE: gl.constexpr,
):  # fmt: skip
    """Start copying rows, or the first columns of rows, of a tile's entries, `G` of each query."""
    ROWS: gl.constexpr = s_rows.shape[0]
    DIM: gl.constexpr = s_rows.shape[1]
    _, b_entry, o_member, o_column = entry_offsets(p_entries, i_entry, count, ROWS, G, DIM, LAYOUT)
    o_query = (b_entry // SLOTS).to(gl.int64) * stride_t
    p_rows = p_base + gl.expand_dims(gl.expand_dims(o_query, 1), 2)
    # Heads side by side are at offsets known to the compiler, which costs no arithmetic.
    p_rows = p_rows + (o_member * (WIDTH if CLOSE else stride_h) + o_column)
    async_copy.async_copy_global_to_shared(s_rows.reshape((ROWS // G, G, DIM)), p_rows)


@gluon.jit
def store_partial(
    s_rows, p_base, p_entries, i_entry, count, stride_t, SLOTS: gl.constexpr, PARTS: gl.constexpr,
    G: gl.constexpr, WIDTH: gl.constexpr, LAYOUT: gl.constexpr,
):  # fmt: skip
    """Write a tile's rows to the places of its entries' slots."""
    ROWS: gl.constexpr = s_rows.shape[0]
    DIM: gl.constexpr = s_rows.shape[1]
    o_entry, b_entry, o_member, o_column = entry_offsets(
        p_entries, i_entry, count, ROWS, G, DIM, LAYOUT
    )
    o_out = (b_entry // SLOTS).to(gl.int64) * stride_t + b_entry % SLOTS * (PARTS * G * WIDTH)
    p_out = p_base + gl.expand_dims(gl.expand_dims(o_out, 1), 2) + (o_member * WIDTH + o_column)
    b_rows = s_rows.reshape((ROWS // G, G, DIM)).load(LAYOUT)
    gl.store(p_out, b_rows, mask=gl.expand_dims(gl.expand_dims(o_entry < count, 1), 2))


@gluon.jit
def load_keys(p_base, o_row, m_row, DIM: gl.constexpr, LAYOUT: gl.constexpr):
    """The rows at these offsets, those masked out as zeros. `[ROWS, DIM]`."""
    o_column = gl.arange(0, DIM, layout=gl.SliceLayout(0, LAYOUT))
    return gl.load(p_base + o_row[:, None] + o_column[None, :], mask=m_row[:, None], other=0.0)


@gluon.jit
def store_sums(p_base, b_tile, o_row, m_row, ADD: gl.constexpr):
    """Write rows, or add them to what no other program touches meanwhile."""
    LAYOUT: gl.constexpr = b_tile.type.layout
    o_column = gl.arange(0, b_tile.shape[1], layout=gl.SliceLayout(0, LAYOUT))
    p_tile = p_base + o_row[:, None] + o_column[None, :]
    if ADD:
        b_tile += gl.load(p_tile, mask=m_row[:, None], other=0.0)
    gl.store(p_tile, b_tile, mask=m_row[:, None])
