"""Matrix products whose sums and results are float32 (float64) whatever the operands are."""

from __future__ import annotations

import torch
from torch import Tensor

from nsa_port.kernels.eager.rows import accumulation_dtype

_WIDE_RESULTS = torch.version.hip is None and "dtype" in torch.ops.aten.bmm.overloads()


def operand_dtype(x: Tensor) -> torch.dtype:
    """What operands of a product are kept in: 16 bits only where the result need not be."""
    if x.dtype.itemsize == 2 and x.device.type == "cuda" and _WIDE_RESULTS:
        return x.dtype
    return accumulation_dtype(x.dtype)


def product(a: Tensor, b: Tensor) -> Tensor:
    """`a @ b` of `[..., R, K]` and `[..., K, N]`; `a` is rounded to the dtype of `b`."""
    a = a.to(b.dtype)
    if b.dtype.itemsize != 2:
        return a @ b
    wide: Tensor = torch.bmm(a.flatten(0, -3), b.flatten(0, -3), out_dtype=torch.float32)
    return wide.view(*a.shape[:-1], b.shape[-1])
