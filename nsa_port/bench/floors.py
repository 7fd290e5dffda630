"""The least that an operator can take: its arithmetic and its traffic, over what a device reaches.

Every formula for a floor is here. Arithmetic counts matrix products only, over the pairs of query
and key that the operator has to look at; traffic counts every input and output once.
"""

from __future__ import annotations

from dataclasses import dataclass

from nsa_port.bench.shapes import Shape
from nsa_port.kernels.geometry import NSAConfig


@dataclass(frozen=True, slots=True)
class Work:
    """What an operation has to do at least: FLOPs, and elements read or written once each."""

    flops: float
    elements: float


@dataclass(frozen=True, slots=True)
class Peaks:
    """What the device reaches: `flops` per second in matmuls, bytes per second in copies."""

    flops: float
    bandwidth: float

    def floor(self, work: Work, element_size: int) -> float:
        """Seconds below which no implementation of `work` can go."""
        return max(work.flops / self.flops, work.elements * element_size / self.bandwidth)


@dataclass(frozen=True, slots=True)
class Passes:
    """The work of an operator's forward, and of its backward if it has one."""

    forward: Work
    backward: Work | None = None


def compressed_pairs(T: int, config: NSAConfig) -> int:
    """Pairs of a query and a compressed block that is complete at it."""
    return sum(config.num_compressed(p + 1) for p in range(T))


def selected_pairs(T: int, config: NSAConfig) -> int:
    """Pairs of a query and a token of its `n` blocks that it sees; its own block is one of them."""
    m, n = config.select_block_size, config.num_selected
    return sum(min(n - 1, p // m) * m + p % m + 1 for p in range(T))


def window_pairs(T: int, config: NSAConfig) -> int:
    """Pairs of a query and one of its last `w` keys."""
    return sum(min(p + 1, config.window_size) for p in range(T))


def operators(shape: Shape) -> dict[str, Passes]:
    """The work of every operator; that of `mean_compress` is for the keys alone."""
    T, H, HK, Dk, Dv = shape.length, shape.heads, shape.kv_heads, shape.key_dim, shape.value_dim
    B, config = shape.batch, shape.config
    C = config.num_compressed(T)
    scored = compressed_pairs(T, config)
    compress = Work(0, B * (T + C) * HK * Dk)
    rows = B * T * H
    return {
        "mean_compress": Passes(compress, compress),
        "compressed_attention": _attention(shape, scored, C),
        "select_blocks": Passes(
            Work(2.0 * B * scored * H * Dk, rows * Dk + B * HK * (C * Dk + T * config.num_selected))
        ),
        "selected_attention": _attention(shape, selected_pairs(T, config), T),
        "window_attention": _attention(shape, window_pairs(T, config), T),
        # Three outputs and their gates in, one out; backward reads its gradient too.
        "combine": Passes(Work(0, rows * (4 * Dv + 3)), Work(0, rows * (7 * Dv + 6))),
    }


def whole(shape: Shape) -> Passes:
    """The work of all of NSA, with one set of keys and values, if nothing else is ever stored."""
    parts = operators(shape).values()
    queries = shape.batch * shape.length * shape.heads
    keys = shape.batch * shape.length * shape.kv_heads * (shape.key_dim + shape.value_dim)
    given = queries * (shape.key_dim + 3) + keys
    out = queries * shape.value_dim
    return Passes(
        Work(sum(part.forward.flops for part in parts), given + out),
        Work(sum(part.backward.flops for part in parts if part.backward), 2 * given + out),
    )


def dense(shape: Shape) -> Passes:
    """The work of causal attention over all tokens."""
    return _attention(shape, shape.length * (shape.length + 1) // 2, shape.length)


def _attention(shape: Shape, pairs: int, keys: int) -> Passes:
    """Softmax attention: two products forward; five backward, the scores' repetition included."""
    B, H, Dk, Dv = shape.batch, shape.heads, shape.key_dim, shape.value_dim
    products = 2.0 * B * H * pairs
    rows, columns = B * shape.length * H * (Dk + Dv), B * keys * shape.kv_heads * (Dk + Dv)
    return Passes(
        Work(products * (Dk + Dv), rows + columns),
        Work(products * (3 * Dk + 2 * Dv), 2 * rows + 2 * columns),
    )
