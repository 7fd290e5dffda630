"""What `nsa_attention` hands from its forward to its backward."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class WholeForward(NamedTuple):
    """What `nsa_attention` computes; without `needs_grad` the branch outputs are empty tensors.

    Shapes: `out`, `o_cmp`, `o_slc`, `o_win` `[B, T, H, Dv]`; `lse` `[3, B, T, H]`;
    `indices` int32 `[B, T, HK, n]`.
    """

    out: Tensor
    o_cmp: Tensor
    o_slc: Tensor
    o_win: Tensor
    lse: Tensor
    indices: Tensor
