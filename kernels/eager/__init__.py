"""NSA in plain PyTorch: every operator of `nsa_port.backends.interface`, on any device torch has.

Two forms compute the branches. `static` has no data-dependent shapes and never waits for the
device; `block_major` reads the chosen blocks on the host and handles all queries of a key block at
once, which suits a CPU. `forms` says which one a call takes. Both are deterministic, hold memory
linear in the number of queries and accumulate in float32 (float64 for float64 inputs).
"""

from __future__ import annotations

import torch

from nsa_port.kernels.eager import operators, pointwise

__all__ = [
    "combine",
    "combine_backward",
    "compressed_attention",
    "compressed_attention_backward",
    "mean_compress",
    "mean_compress_backward",
    "nsa_attention",
    "nsa_attention_backward",
    "select_blocks",
    "selected_attention",
    "selected_attention_backward",
    "window_attention",
    "window_attention_backward",
]

_no_grad = torch.no_grad()

mean_compress = _no_grad(pointwise.mean_compress)
mean_compress_backward = _no_grad(pointwise.mean_compress_backward)
combine = _no_grad(pointwise.combine)
combine_backward = _no_grad(pointwise.combine_backward)
compressed_attention = _no_grad(operators.compressed_attention)
compressed_attention_backward = _no_grad(operators.compressed_attention_backward)
select_blocks = _no_grad(operators.select_blocks)
selected_attention = _no_grad(operators.selected_attention)
selected_attention_backward = _no_grad(operators.selected_attention_backward)
window_attention = _no_grad(operators.window_attention)
window_attention_backward = _no_grad(operators.window_attention_backward)
nsa_attention = _no_grad(operators.nsa_attention)
nsa_attention_backward = _no_grad(operators.nsa_attention_backward)
