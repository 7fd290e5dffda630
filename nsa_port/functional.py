"""What users call: NSA and its parts as functions.

Shapes, in every function: q `[B, T, H, Dk]`, keys `[B, S, HK, Dk]`, values `[B, S, HK, Dv]`,
compressed keys and values `[B, C, HK, D]` with `C = cfg.num_compressed(S)`. float16, bfloat16,
float32, and float64 on the PyTorch backend; all tensors of a call share dtype and device (gates
may have their own dtype); any strides whose last dimension is contiguous.

Arguments that most functions share:

- `scale`: what logits are multiplied with, `Dk ** -0.5` by default.
- `cu_seqlens`: int32 `[N + 1]`, packs N sequences in a batch of 1; `cu_seqlens_k` where keys and
  queries differ in length. Block grids restart at each sequence; compressed blocks of the
  sequences follow each other.
- `positions`: int32 `[T]` or `[B, T]`, the queries' positions in their sequence where they are not
  the last T of S, in any order; -1 marks a padded row.
- `backend`: forces a backend, see `nsa_port.backends()`.

Rows that see no key give 0, an `lse` of -inf, and zero gradients. A NaN or inf in a token may reach
every row of its own sequence and key/value head (of its batch entry), and no other.

Errors, all raised before anything is computed: `ValueError` for shapes, values and devices,
`TypeError` for dtypes, `BackendUnavailable` if no (or not the forced) backend can run the call.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nsa_port import ops, registry
from nsa_port.kernels.geometry import NSAConfig

__all__ = [
    "combine",
    "compressed_attention",
    "mean_compress",
    "nsa_attention",
    "select_blocks",
    "selected_attention",
    "window_attention",
]

_ops = torch.ops.nsa_port


def nsa_attention(
    q: Tensor,
    k_cmp: Tensor,
    v_cmp: Tensor,
    k_slc: Tensor,
    v_slc: Tensor,
    k_win: Tensor,
    v_win: Tensor,
    gates: Tensor,
    cfg: NSAConfig,
    *,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    positions: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Native Sparse Attention: the gated sum of the compressed, selected and window branches.

    Args:
        gates: values in [0, 1] that broadcast to `[B, T, H, 3]`: compressed, selected, window.

    Returns:
        `[B, T, H, Dv]`. Differentiable in every tensor; the choice of blocks is not.

    Source: arXiv 2502.11089, Eq. 5.
    """
    needs_grad = _needs_grad(q, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, gates)
    where = _where(
        q, cfg, k_slc.shape[1], scale, cu_seqlens, cu_seqlens_k, positions, needs_grad, backend
    )
    return ops.run_whole(q, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, gates, *where)[0]


def mean_compress(
    k: Tensor,
    cfg: NSAConfig,
    *,
    cu_seqlens: Tensor | None = None,
    num_blocks: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """Average each compression block: the parameter-free phi.

    Args:
        k: keys or values, `[B, S, HK, D]`.
        num_blocks: rows to return; the ones past the last block are 0. By default exactly as many
            as there are, which for packed sequences on a device costs a synchronisation;
            `S // cfg.block_stride` is always enough.

    Returns:
        `[B, C, HK, D]`. Differentiable.

    Source: arXiv 2502.11089, Eq. 7.
    """
    return ops.run_mean_compress(
        k, cfg.as_ints(), cu_seqlens, num_blocks, registry.request_text(backend)
    )


def compressed_attention(
    q: Tensor,
    k_cmp: Tensor,
    v_cmp: Tensor,
    cfg: NSAConfig,
    *,
    num_keys: int | None = None,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    positions: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Attend to the compressed blocks that are complete at each query.

    Args:
        num_keys: `S`, how many tokens were compressed; `T` by default.

    Returns:
        `out [B, T, H, Dv]` and `lse [B, T, H]`, the natural log of the sum of exponentials, in
        float32 (float64 for float64). Both differentiable.

    Source: arXiv 2502.11089, Eq. 8.
    """
    where = _where(
        q,
        cfg,
        _num_keys(q, k_cmp, cfg, num_keys, cu_seqlens_k),
        scale,
        cu_seqlens,
        cu_seqlens_k,
        positions,
        _needs_grad(q, k_cmp, v_cmp),
        backend,
    )
    return _ops.compressed_attention(q, k_cmp, v_cmp, *where)


def select_blocks(
    q: Tensor,
    k_cmp: Tensor,
    lse: Tensor,
    cfg: NSAConfig,
    *,
    num_keys: int | None = None,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    positions: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Choose the blocks that each query and KV head attends to.

    Args:
        lse: what `compressed_attention` returned for the same arguments.
        num_keys: `S`, how many tokens were compressed; `T` by default.

    Returns:
        int32 `[B, T, HK, n]`, ascending, padded with -1 at the end. Not differentiable.

    Source: arXiv 2502.11089, Eq. 9 to 11.
    """
    where = _where(
        q,
        cfg,
        _num_keys(q, k_cmp, cfg, num_keys, cu_seqlens_k),
        scale,
        cu_seqlens,
        cu_seqlens_k,
        positions,
        False,
        backend,
    )
    return _ops.select_blocks(q.detach(), k_cmp.detach(), lse.detach(), *where)


def selected_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    idx: Tensor,
    cfg: NSAConfig,
    *,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    positions: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Attend to the tokens of the chosen blocks up to each query, in one softmax.

    Args:
        idx: int32 `[B, T, HK, n]`, distinct blocks in any order; -1 stands for none.

    Returns:
        `out [B, T, H, Dv]` and `lse [B, T, H]`. Both differentiable in q, k and v.

    Source: arXiv 2502.11089, Eq. 11 and 12.
    """
    needs_grad = _needs_grad(q, k, v)
    where = _where(
        q, cfg, k.shape[1], scale, cu_seqlens, cu_seqlens_k, positions, needs_grad, backend
    )
    return _ops.selected_attention(q, k, v, idx, *where)


def window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cfg: NSAConfig,
    *,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    positions: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Attend to the last `cfg.window_size` keys up to each query, its own among them.

    Returns:
        `out [B, T, H, Dv]` and `lse [B, T, H]`. Both differentiable.

    Source: arXiv 2502.11089, section 3.3.3.
    """
    needs_grad = _needs_grad(q, k, v)
    where = _where(
        q, cfg, k.shape[1], scale, cu_seqlens, cu_seqlens_k, positions, needs_grad, backend
    )
    return _ops.window_attention(q, k, v, *where)


def combine(
    o_cmp: Tensor, o_slc: Tensor, o_win: Tensor, gates: Tensor, *, backend: str | None = None
) -> Tensor:
    """The gated sum of the branch outputs `[B, T, H, Dv]`; gates broadcast to `[B, T, H, 3]`.

    Source: arXiv 2502.11089, Eq. 5.
    """
    return _ops.combine(o_cmp, o_slc, o_win, gates, registry.request_text(backend))


def _needs_grad(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def _num_keys(
    q: Tensor, k_cmp: Tensor, cfg: NSAConfig, num_keys: int | None, cu_seqlens_k: Tensor | None
) -> int:
    """S: given, or T, or (packed keys of their own length) the most that C blocks may cover."""
    if num_keys is not None:
        return num_keys
    if cu_seqlens_k is None:
        return q.shape[1]
    return k_cmp.shape[1] * cfg.block_stride + cfg.block_size


def _where(
    q: Tensor,
    cfg: NSAConfig,
    num_keys: int,
    scale: float | None,
    cu_seqlens: Tensor | None,
    cu_seqlens_k: Tensor | None,
    positions: Tensor | None,
    needs_grad: bool,
    backend: str | None,
) -> tuple:
    """The arguments that every attention operator ends with."""
    if cu_seqlens is None and cu_seqlens_k is not None:
        raise ValueError("cu_seqlens_k needs cu_seqlens")
    return (
        cfg.as_ints(),
        num_keys,
        q.shape[-1] ** -0.5 if scale is None else scale,
        cu_seqlens,
        cu_seqlens if cu_seqlens_k is None else cu_seqlens_k,
        positions,
        needs_grad,
        registry.request_text(backend),
    )
