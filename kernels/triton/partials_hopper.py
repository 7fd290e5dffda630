"""How the kernels for Hopper that go by block leave partial results, and how these are read again.

A query's partial results of one slot are `HEADS * WIDTH` numbers side by side, in an order in which
a thread that holds a part of a product's result has 8 of them next to each other, and a warp 256:
they go to memory and come back 16 bytes a thread, with no detour through shared memory.
"""

from __future__ import annotations

import triton.experimental.gluon.language as gl
from triton import constexpr_function
from triton.experimental import gluon


@constexpr_function
def layout_of_partials(HEADS, WIDTH):
    """The layout of `[64 // HEADS, HEADS * WIDTH]` that a product's result has in a warpgroup."""
    HEADS, WIDTH = getattr(HEADS, "value", HEADS), getattr(WIDTH, "value", WIDTH)

    def of_row(row):
        return [0, row * 32] if row < HEADS else [row // HEADS, 0]

    panels = [[0, HEADS * column] for column in (32, 64, 128) if column < WIDTH]
    return gl.DistributedLinearLayout(
        reg_bases=[[0, 1], [0, 2], [0, 4], of_row(8), *panels],
        lane_bases=[[0, 8], [0, 16], of_row(1), of_row(2), of_row(4)],
        warp_bases=[of_row(16), of_row(32)],
        block_bases=[],
        shape=[64 // HEADS, HEADS * WIDTH],
    )


@gluon.jit
def to_partials(b_out, HEADS: gl.constexpr, LAYOUT: gl.constexpr):
    """`[64, WIDTH]`, the heads of one query after the other, in the order of partial results."""
    WIDTH: gl.constexpr = b_out.shape[1]
    b_out = b_out.reshape([64 // HEADS, HEADS, WIDTH // 32, 4, 4, 2]).permute((0, 2, 1, 4, 3, 5))
    b_out = b_out.reshape([64 // HEADS, HEADS * WIDTH])
    return gl.convert_layout(b_out, LAYOUT, assert_trivial=True)


@gluon.jit
def from_partials(b_partial, HEADS: gl.constexpr, WIDTH: gl.constexpr, LAYOUT: gl.constexpr):
    """The reverse: `[64, WIDTH]` in the layout of a product's result."""
    b_out = b_partial.reshape([64 // HEADS, WIDTH // 32, HEADS, 4, 4, 2])
    b_out = b_out.permute((0, 2, 1, 4, 3, 5)).reshape([64, WIDTH])
    return gl.convert_layout(b_out, LAYOUT, assert_trivial=True)
