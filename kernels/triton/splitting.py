"""Few queries, as in decoding: each query's keys are split over programs, so that a GPU is full.

Each split of the keys gives an output and its lse, in float32; they are merged in order.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa_port.kernels.triton.host import cdiv, multiprocessors, next_power_of_2
from nsa_port.kernels.triton.tiles import LOG2_E, LOG_2

_MOST_SPLITS = 64
_FEWEST_KEYS = 128
"""Of a split: fewer cost less than merging does."""

_WIDTH = 64
"""Columns that a program merges."""

_PROGRAMS_OF_A_MULTIPROCESSOR = 4
"""On NVIDIA GPUs, where one program waits for memory more than it works."""

_PROGRAMS_WITHOUT_GPU = 16
"""What fills an interpreter or an emulator; as few as make the small calls of tests split."""


class Splits(NamedTuple):
    """Where the splits of a call go.

    Args:
        number: of programs that share the keys of a query.
        most: that there may be however many keys there are, a power of two.
        active: whether results go to `out` and `lse` here and have to be merged. Like `most` it
            depends on the queries alone: a cache that grows never changes which kernels run.
        out: `[number, *shape of the output]`, float32; the output itself unless active.
        lse: the same for the lse.
    """

    number: int
    most: int
    active: bool
    out: Tensor
    lse: Tensor


Merge = Callable[[Splits, Tensor, Tensor], None]
"""What is done with splits, and the output and lse that they are of: `merge_splits` or later."""


def split_keys(programs: int, keys: int, most_keys: int | None, out: Tensor, lse: Tensor) -> Splits:
    """How to split the keys of each query. Ends with `merge_splits`.

    Args:
        programs: that there would be without splits.
        keys: that a query sees at most.
        most_keys: the same of a sequence of any length, None if that has no bound.
    """
    if not leaves_idle(programs, out.device):
        return Splits(1, 1, False, out, lse)
    most = min(_programs_to_fill(out.device) // programs, _MOST_SPLITS)
    if most_keys is not None:
        keys = min(keys, most_keys)
        most = min(most, max(1, cdiv(most_keys, _FEWEST_KEYS)))
    number = max(1, min(most, cdiv(keys, _FEWEST_KEYS)))
    partial_out = torch.empty((number, *out.shape), dtype=torch.float32, device=out.device)
    partial_lse = torch.empty((number, *lse.shape), dtype=torch.float32, device=out.device)
    return Splits(number, next_power_of_2(most), True, partial_out, partial_lse)


def leaves_idle(programs: int, device: torch.device) -> bool:
    """Whether so few programs fill less than half of the GPU."""
    return _programs_to_fill(device) // programs > 1


def _programs_to_fill(device: torch.device) -> int:
    if device.type == "cpu":
        return _PROGRAMS_WITHOUT_GPU
    return multiprocessors(device) * (1 if torch.version.hip else _PROGRAMS_OF_A_MULTIPROCESSOR)


def merge_splits(splits: Splits, out: Tensor, lse: Tensor) -> None:
    """Fill `out` and `lse` with what the splits gave."""
    if not splits.active:
        return
    dim = out.shape[-1]
    _merge_splits_kernel[(lse.numel(), cdiv(dim, _WIDTH))](
        splits.out,
        splits.lse,
        out,
        lse,
        lse.numel(),
        splits.number,
        DIM=dim,
        WIDTH=_WIDTH,
        SPLITS=splits.most,
        num_warps=max(1, min(4, splits.most * _WIDTH // 512)),
    )


@triton.jit
def split_range(start, stop, i_split, splits):
    """The part of `start .. stop - 1` that a split takes; empty for the last where few are left."""
    part = tl.cdiv(stop - start, splits)
    split_start = tl.minimum(start + i_split * part, stop)
    return split_start, tl.minimum(split_start + part, stop)


@triton.jit(do_not_specialize=["rows", "splits"])
def _merge_splits_kernel(
    partial_out,
    partial_lse,
    out,
    lse,
    rows,
    splits,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """One program: `WIDTH` columns of one row, which is a query and head."""
    i_row = tl.program_id(0).to(tl.int64)
    i_column = tl.program_id(1)
    o_column = i_column * WIDTH + tl.arange(0, WIDTH)
    b_out, row_lse = merge_row(partial_out, partial_lse, i_row, rows, splits, o_column, DIM, SPLITS)
    tl.store(out + i_row * DIM + o_column, b_out.to(out.dtype.element_ty), mask=o_column < DIM)
    if i_column == 0:
        tl.store(lse + i_row, row_lse)


@triton.jit
def merge_row(
    partial_out, partial_lse, i_row, rows, splits, o_column, DIM: tl.constexpr, SPLITS: tl.constexpr
):
    """Some columns of one row's output, and its lse, from those of its splits."""
    o_split = tl.arange(0, SPLITS)
    m_split = o_split < splits
    o_partial = o_split.to(tl.int64) * rows + i_row
    b_lse = tl.load(partial_lse + o_partial, mask=m_split, other=float("-inf")) * LOG2_E
    maximum = tl.max(b_lse, 0)
    shift = tl.where(maximum == float("-inf"), 0.0, maximum)
    b_weight = tl.exp2(b_lse - shift)
    total = tl.sum(b_weight, 0)
    total = tl.where(total == 0.0, 1.0, total)
    p_out = partial_out + o_partial[:, None] * DIM + o_column[None, :]
    b_out = tl.load(p_out, mask=m_split[:, None] & (o_column < DIM)[None, :], other=0.0)
    b_out = tl.sum(b_out.to(tl.float32) * b_weight[:, None], 0) / total
    return b_out, (maximum + tl.log2(total)) * LOG_2
