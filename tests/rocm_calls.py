"""Calls of every operator on CPU tensors, small enough to run on an emulated GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from nsa_port.kernels.geometry import Layout, NSAConfig
from nsa_port.kernels.tables import tuned_to

CONFIG = NSAConfig()


@dataclass(frozen=True)
class Shape:
    """The last `queries` queries of one sequence of `keys` tokens, as in chunked prefill.

    Few queries see many keys, so that a short run has the proportions of a long sequence: every
    slot holds a block, and most tiles are seen in full.
    """

    queries: int = 128
    keys: int = 2048
    group: int = 16
    key_dim: int = 128
    value_dim: int = 128
    kv_heads: int = 1
    dtype: torch.dtype = torch.bfloat16


def random_selection(shape: Shape) -> Tensor:
    """Random blocks beside the forced ones, ascending. int32 `[1, T, HK, n]`."""
    m, n = CONFIG.select_block_size, CONFIG.num_selected
    block = torch.arange(CONFIG.num_select_blocks(shape.keys))
    own = (torch.arange(shape.queries) + shape.keys - shape.queries) // m
    distance = own[:, None] - block
    forced = (block < CONFIG.init_blocks) | (distance < CONFIG.local_blocks)
    score = torch.rand(shape.queries, shape.kv_heads, len(block))
    score.masked_fill_(forced[:, None], 2.0).masked_fill_((distance < 0)[:, None], -1.0)
    value, index = score.topk(min(n, len(block)), -1)
    index = index.masked_fill(value < 0, len(block)).sort(-1).values
    index = index.masked_fill(index == len(block), -1).to(torch.int32)[None]
    return torch.nn.functional.pad(index, (0, n - index.shape[-1]), value=-1).contiguous()


def calls(kernels: ModuleType, shape: Shape) -> dict[str, Callable[[], Any]]:
    """Every operator of a module of kernels as a call without arguments, on random inputs."""
    torch.manual_seed(0)
    layout, scale = Layout(shape.keys), shape.key_dim**-0.5
    HK, H, T, S = shape.kv_heads, shape.kv_heads * shape.group, shape.queries, shape.keys
    Dk, Dv = shape.key_dim, shape.value_dim
    C = CONFIG.num_compressed(S)

    def random(*size: int) -> Tensor:
        return torch.randn(*size).to(shape.dtype)

    q, grad, out = random(1, T, H, Dk), random(1, T, H, Dv), random(1, T, H, Dv)
    k, v = random(1, S, HK, Dk), random(1, S, HK, Dv)
    k_cmp, v_cmp = random(1, C, HK, Dk), random(1, C, HK, Dv)
    branches = [random(1, T, H, Dv) for _ in range(3)]
    gates = torch.rand(1, T, H, 3).to(shape.dtype)
    # As large as an lse of random scores, so that nothing overflows.
    lse = torch.full((1, T, H), 8.0)
    indices = random_selection(shape)
    tail = (CONFIG, layout, scale)
    return {
        "mean_compress": lambda: kernels.mean_compress(k, CONFIG, layout, C),
        "mean_compress_backward": lambda: kernels.mean_compress_backward(k_cmp, CONFIG, layout),
        "compressed": lambda: kernels.compressed_attention(q, k_cmp, v_cmp, *tail),
        "compressed_backward": lambda: kernels.compressed_attention_backward(
            grad, None, q, k_cmp, v_cmp, out, lse, *tail
        ),
        "select": lambda: kernels.select_blocks(q, k_cmp, lse, *tail),
        "selected": lambda: kernels.selected_attention(q, k, v, indices, *tail),
        "selected_backward": lambda: kernels.selected_attention_backward(
            grad, None, q, k, v, indices, out, lse, *tail
        ),
        "window": lambda: kernels.window_attention(q, k, v, *tail),
        "window_backward": lambda: kernels.window_attention_backward(
            grad, None, q, k, v, out, lse, *tail
        ),
        "combine": lambda: kernels.combine(*branches, gates),
        "combine_backward": lambda: kernels.combine_backward(grad, *branches, gates),
    }


FUNCTIONS = {
    "interval_forward": ("window", "_interval_forward_kernel"),
    "interval_dq": ("window_backward", "_interval_dq_kernel"),
    "interval_dkdv": ("window_backward", "_interval_dkdv_kernel"),
    "block_scores": ("select", "_block_scores_kernel"),
    "selected_by_wave": ("selected", "_by_wave_kernel"),
    "selected_by_tile": ("selected", "_by_tile_kernel"),
    "selected_by_query": ("selected", "_by_query_kernel"),
    "selected_by_block": ("selected", "_by_block_kernel"),
    "selected_backward": ("selected_backward", "_by_block_backward_kernel"),
}
"""Tuned kernel -> a call that launches it, and the device function that its values go to."""

OF_SMALL_GROUPS = ("selected_by_block", "selected_by_tile")
"""Kernels that `choosing` chooses for a group of 4, the others for one of 16."""


@contextmanager
def choosing(kernel: str, values: Mapping[str, int]) -> Iterator[None]:
    """Lay values over a kernel's entry and see to it that the kernel is the one that is chosen."""
    design = {"fewest_queries": 0, "largest_group": 64 if kernel == "selected_by_block" else 0}
    with tuned_to({kernel: values}), tuned_to({"selected_by_block": design}):
        yield
