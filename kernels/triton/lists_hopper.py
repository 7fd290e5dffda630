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
def find_block(
    p_entries, i_batch, i_kv, rows, sequence, cu_keys, first_query, T, S, HK, stride_bounds,
    SLOTS: gl.constexpr, SELECT: gl.constexpr,
):  # fmt: skip
    """Where the keys of a list's block start and stop."""
    entry = gl.load(p_entries)
    i_query = first_query + entry // SLOTS
    first_key = gl.load(rows + ((i_batch * T + i_query) * HK + i_kv) * SLOTS + entry % SLOTS)
    if cu_keys is None:
        stop = S
    else:
        i_sequence = gl.load(sequence + i_batch * stride_bounds + i_query)
        stop = gl.minimum(gl.load(cu_keys + i_sequence + 1), S)
    return first_key, gl.minimum(stop, first_key + SELECT)


@gluon.jit
def store_block(
    b_dk, b_dk_rest, b_dv, b_key, i_batch, i_kv, i_part, i_work, starts, counts, segment_ends,
    work_bins, long_ends, partial_dkdv, dk, dv, S, HK, bins,
    PARTS: gl.constexpr, SEGMENT: gl.constexpr, K_REST: gl.constexpr,
):  # fmt: skip
    """Add a segment's `dk` and `dv` to the totals, or store them where a list has more segments.

    `b_key` is 2147483647 for keys that are not there.
    """
    BLOCK_N: gl.constexpr = b_dk.shape[0]
    DIM_V: gl.constexpr = b_dv.shape[1]
    DIM_K: gl.constexpr = DIM_V + K_REST
    SUMS: gl.constexpr = b_dv.type.layout
    SUMS_REST: gl.constexpr = b_dk_rest.type.layout
    i_bin, _, _, total = load_work(i_work, starts, counts, segment_ends, work_bins, bins, SEGMENT)
    o_block = gl.arange(0, BLOCK_N, layout=gl.SliceLayout(1, SUMS))
    o_block_rest = gl.arange(0, BLOCK_N, layout=gl.SliceLayout(1, SUMS_REST))
    o_key = gl.convert_layout(b_key, gl.SliceLayout(1, SUMS))
    o_key_rest = gl.convert_layout(b_key, gl.SliceLayout(1, SUMS_REST))
    m_key = o_key < 2147483647
    m_key_rest = o_key_rest < 2147483647
    if total <= SEGMENT:
        o_out = (i_batch * S + o_key) * HK + i_kv
        _store_sums(dk, b_dk, o_out * DIM_K, m_key, True)
        _store_sums(dv, b_dv, o_out * DIM_V, m_key, True)
        if K_REST:
            o_out = ((i_batch * S + o_key_rest) * HK + i_kv) * DIM_K
            _store_sums(dk + DIM_V, b_dk_rest, o_out, m_key_rest, True)
    else:
        # Segments of long lists are stored side by side: dk in the first columns, dv after them.
        i_segment = gl.load(long_ends + i_bin) - (gl.load(segment_ends + i_bin) - i_work)
        i_out = (i_segment * PARTS + i_part).to(gl.int64) * BLOCK_N
        o_out = (i_out + o_block) * (DIM_K + DIM_V)
        _store_sums(partial_dkdv, b_dk, o_out, m_key, False)
        _store_sums(partial_dkdv + DIM_K, b_dv, o_out, m_key, False)
        if K_REST:
            o_out = (i_out + o_block_rest) * (DIM_K + DIM_V)
            _store_sums(partial_dkdv + DIM_V, b_dk_rest, o_out, m_key_rest, False)


@gluon.jit
def _store_sums(p_base, b_tile, o_row, m_row, ADD: gl.constexpr):
    """Write rows, or add them to what no other program touches meanwhile."""
    LAYOUT: gl.constexpr = b_tile.type.layout
    o_column = gl.arange(0, b_tile.shape[1], layout=gl.SliceLayout(0, LAYOUT))
    p_tile = p_base + o_row[:, None] + o_column[None, :]
    if ADD:
        b_tile += gl.load(p_tile, mask=m_row[:, None], other=0.0)
    gl.store(p_tile, b_tile, mask=m_row[:, None])
