"""Stored answers of the reference: `python -m tests.golden` writes them anew.

Inputs are sines, so that no random generator can change them. Write anew only when the meaning of
NSA changes, and say so in the changelog.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor

from nsa_port import NSAConfig, reference

PATH = Path(__file__).parent / "data" / "golden.json"

CASES = {
    "overlap": (NSAConfig(4, 2, 8, 3, 1, 1, 5), None),
    "literal": (NSAConfig(4, 2, 8, 3, 1, 1, 5, "literal"), None),
    "packed": (NSAConfig(4, 2, 4, 4, 1, 2, 3), [0, 3, 3, 20, 37]),
}


def inputs() -> tuple[Tensor, ...]:
    """q, three key/value sets, gates: B=1, T=37, H=4, HK=2, Dk=3, Dv=2."""

    def sines(seed: int, *shape: int) -> Tensor:
        index = torch.arange(torch.Size(shape).numel(), dtype=torch.float64)
        return torch.sin(index * (0.7 + 0.1 * seed) + seed).reshape(shape)

    q = 2 * sines(1, 1, 37, 4, 3)
    keys = [sines(seed, 1, 37, 2, size) for seed, size in zip(range(2, 8), (3, 2) * 3, strict=True)]
    return (q, *keys, torch.sigmoid(sines(8, 1, 37, 4, 3)))


def answers(name: str) -> dict[str, list]:
    """Output, chosen blocks and gradients of one case, as nested lists."""
    cfg, cu = CASES[name]
    cu_seqlens = None if cu is None else torch.tensor(cu, dtype=torch.int32)
    leaves = [tensor.requires_grad_() for tensor in inputs()]
    q, k1, v1, k2, v2, k3, v3, gates = leaves
    k_cmp = reference.mean_compress(k1, cfg, cu_seqlens=cu_seqlens)
    v_cmp = reference.mean_compress(v1, cfg, cu_seqlens=cu_seqlens)
    _, lse = reference.compressed_attention(q, k_cmp, v_cmp, cfg, cu_seqlens=cu_seqlens)
    idx = reference.select_blocks(q, k_cmp, lse, cfg, cu_seqlens=cu_seqlens)
    out = reference.nsa_attention(
        q, k_cmp, v_cmp, k2, v2, k3, v3, gates, cfg, cu_seqlens=cu_seqlens
    )
    grads = torch.autograd.grad(out, leaves, torch.cos(out.detach() * 3))
    sums = [grad.sum((0, 1)).tolist() for grad in grads]
    return {"out": out.tolist(), "indices": idx.tolist(), "gradient sums": sums}


if __name__ == "__main__":
    PATH.write_text(json.dumps({name: answers(name) for name in CASES}, indent=None) + "\n")
