"""Bad input raises here, before any kernel starts and before anything changes.

Shapes, dtypes and devices are always checked. The data of cu_seqlens, positions and block indices
is checked for CPU tensors, and for device tensors under `NSA_PORT_CHECK=1`: reading it there would
synchronise with the device.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from nsa_port import settings
from nsa_port.kernels.geometry import Layout, NSAConfig

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def queries(q: Tensor) -> None:
    """`q` is `[B, T, H, Dk]` in a dtype that attention is defined for."""
    _tensor4("q", q)


def keys(q: Tensor, k: Tensor, v: Tensor | None, names: tuple[str, str]) -> None:
    """Keys `[B, N, HK, Dk]` and values `[B, N, HK, Dv]` fit each other and `q`."""
    k_name, v_name = names
    _tensor4(k_name, k)
    _like("q", q, k_name, k)
    _same(f"the batch of {k_name}", k.shape[0], "that of q", q.shape[0])
    _same(f"the head dimension of {k_name}", k.shape[3], "that of q", q.shape[3])
    heads, kv_heads = q.shape[2], k.shape[2]
    if kv_heads == 0 or heads % kv_heads:
        raise ValueError(
            f"the heads of q must be a multiple of those of {k_name}, got {heads} and {kv_heads}"
        )
    if v is not None:
        _tensor4(v_name, v)
        _like("q", q, v_name, v)
        if v.shape[:3] != k.shape[:3]:
            raise ValueError(
                f"{k_name} and {v_name} must agree in batch, length and heads, got "
                f"{list(k.shape)} and {list(v.shape)}"
            )


def same_heads(k: Tensor, v: Tensor, other_k: Tensor, other_v: Tensor, name: str) -> None:
    """Two key/value sets of one call have the same heads and head dimensions."""
    _same(f"the heads of {name}", other_k.shape[2], "those of k_cmp", k.shape[2])
    _same(f"the head dimension of v_{name[2:]}", other_v.shape[3], "that of v_cmp", v.shape[3])


def num_blocks(k_cmp: Tensor, config: NSAConfig, layout: Layout) -> None:
    """`k_cmp` holds the compressed blocks of `layout.num_keys` tokens."""
    if layout.num_keys < 0:
        raise ValueError(f"num_keys must not be negative, got {layout.num_keys}")
    found = k_cmp.shape[1]
    if not layout.packed:
        expected = config.num_compressed(layout.num_keys)
        if found != expected:
            raise ValueError(
                f"k_cmp must hold {expected} blocks, the compressed blocks of {layout.num_keys} "
                f"keys (block_size={config.block_size}, block_stride={config.block_stride}), "
                f"got {found}; pass num_keys if the keys are not as many as the queries"
            )
    elif layout.cu_seqlens_k is not None and _readable(layout.cu_seqlens_k):
        expected = int(layout.compressed_cu_seqlens(config)[-1])
        if found < expected:
            raise ValueError(
                f"k_cmp must hold the {expected} compressed blocks of all packed sequences, "
                f"got {found}"
            )


def layout(
    layout: Layout, batch: int, num_queries: int, num_keys: int | None, device: torch.device
) -> None:
    """cu_seqlens and positions fit the queries, and the keys where `num_keys` says how many."""
    if layout.positions is not None:
        _integers("positions", layout.positions, device)
        if tuple(layout.positions.shape) not in ((num_queries,), (batch, num_queries)):
            raise ValueError(
                f"positions must be [T] or [B, T] with T={num_queries} and B={batch}, got "
                f"{list(layout.positions.shape)}"
            )
    if layout.packed:
        assert layout.cu_seqlens is not None and layout.cu_seqlens_k is not None
        if batch != 1:
            raise ValueError(f"packed sequences must have batch 1, got {batch}")
        cumulative("cu_seqlens", layout.cu_seqlens, num_queries, "queries", device)
        cumulative("cu_seqlens_k", layout.cu_seqlens_k, num_keys, "keys", device)
        if layout.cu_seqlens.shape != layout.cu_seqlens_k.shape:
            raise ValueError(
                "cu_seqlens and cu_seqlens_k must have the same length, got "
                f"{layout.cu_seqlens.numel()} and {layout.cu_seqlens_k.numel()}"
            )
        _packed_data(layout, num_queries)
    elif layout.positions is None:
        if num_queries > layout.num_keys:
            raise ValueError(
                f"more queries than keys: T={num_queries} > S={layout.num_keys}; queries are the "
                "last T of S tokens unless positions say otherwise"
            )
    elif _readable(layout.positions):
        _within("positions", layout.positions, -1, layout.num_keys - 1)


def cumulative(name: str, cu: Tensor, total: int | None, what: str, device: torch.device) -> None:
    """`cu` is int32 `[N + 1]`, starts at 0, never decreases, and ends at `total` tokens."""
    _integers(name, cu, device)
    if cu.dim() != 1 or cu.numel() < 1:
        raise ValueError(f"{name} must be [N + 1], got {list(cu.shape)}")
    if not _readable(cu):
        return
    values = cu.tolist()
    if values[0] != 0:
        raise ValueError(f"{name} must start at 0, got {values[0]}")
    for i, (before, after) in enumerate(zip(values[:-1], values[1:], strict=True)):
        if after < before:
            raise ValueError(f"{name} must not decrease, got {before} then {after} at index {i}")
    if total is not None and values[-1] != total:
        raise ValueError(f"{name} must end at the number of {what}, {total}, got {values[-1]}")


def _packed_data(layout: Layout, num_queries: int) -> None:
    cu, cu_k = layout.cu_seqlens, layout.cu_seqlens_k
    assert cu is not None and cu_k is not None
    if not (_readable(cu) and _readable(cu_k)):
        return
    lengths = cu_k[1:] - cu_k[:-1]
    if layout.positions is None:
        more = ((cu[1:] - cu[:-1]) > lengths).nonzero()
        if len(more):
            raise ValueError(f"sequence {int(more[0])} has more queries than keys")
    elif _readable(layout.positions):
        last = lengths[layout.sequence_of(cu, num_queries)] - 1
        wrong = ((layout.positions > last) | (layout.positions < -1)).reshape(-1).nonzero()
        if len(wrong):
            where = int(wrong[0])
            raise ValueError(
                f"positions must lie in -1 .. S - 1 of their sequence, got "
                f"{int(layout.positions.reshape(-1)[where])} at query {where}"
            )


def indices(idx: Tensor, k: Tensor, num_queries: int, config: NSAConfig, layout: Layout) -> None:
    """`idx` is int32 `[B, T, HK, n]` of distinct blocks that exist, or -1."""
    _integers("idx", idx, k.device)
    expected = (k.shape[0], num_queries, k.shape[2], config.num_selected)
    if tuple(idx.shape) != expected:
        raise ValueError(f"idx must be [B, T, HK, n] = {list(expected)}, got {list(idx.shape)}")
    if not _readable(idx) or not idx.numel():
        return
    blocks = torch.tensor(config.num_select_blocks(layout.num_keys), dtype=torch.int32)
    if layout.cu_seqlens is not None and layout.cu_seqlens_k is not None:
        lengths = layout.cu_seqlens_k[1:] - layout.cu_seqlens_k[:-1]
        lengths = (lengths + config.select_block_size - 1) // config.select_block_size
        blocks = lengths[layout.sequence_of(layout.cu_seqlens, num_queries)][:, None, None]
    wrong = idx[(idx >= blocks.to(idx.device)) | (idx < -1)]
    if len(wrong):
        raise ValueError(
            f"idx must lie in -1 .. {int(blocks.max()) - 1}, the blocks of its sequence, "
            f"got {int(wrong[0])}"
        )
    ordered = idx.sort(dim=-1).values
    if ((ordered[..., 1:] == ordered[..., :-1]) & (ordered[..., 1:] >= 0)).any():
        raise ValueError("idx names a block twice for one query")


def log_sum_exp(lse: Tensor, q: Tensor) -> None:
    """`lse` is what `compressed_attention` returned for `q`: `[B, T, H]`."""
    if tuple(lse.shape) != tuple(q.shape[:3]):
        raise ValueError(f"lse must be [B, T, H] = {list(q.shape[:3])}, got {list(lse.shape)}")
    expected = torch.promote_types(q.dtype, torch.float32)
    if lse.dtype != expected:
        raise TypeError(f"lse must be {expected} for q in {q.dtype}, got {lse.dtype}")
    on_device("lse", lse, q.device)


def branches(o_cmp: Tensor, o_slc: Tensor, o_win: Tensor) -> None:
    """The three branch outputs are alike, `[B, T, H, Dv]`."""
    for name, tensor in (("o_cmp", o_cmp), ("o_slc", o_slc), ("o_win", o_win)):
        _tensor4(name, tensor)
        _like("o_cmp", o_cmp, name, tensor)
        if tensor.shape != o_cmp.shape:
            raise ValueError(
                f"{name} must have the shape of o_cmp, {list(o_cmp.shape)}, got "
                f"{list(tensor.shape)}"
            )


def gates(gates: Tensor, shape: tuple[int, ...], device: torch.device) -> None:
    """`gates` broadcasts to `[B, T, H, 3]`."""
    if not gates.is_floating_point():
        raise TypeError(f"gates must be floating point, got {gates.dtype}")
    on_device("gates", gates, device)
    expected = (*shape, 3)
    fits = gates.dim() <= 4 and all(
        size in (1, want)
        for size, want in zip(reversed(gates.shape), reversed(expected), strict=False)
    )
    if not fits:
        raise ValueError(
            f"gates must broadcast to [B, T, H, 3] = {list(expected)}, got {list(gates.shape)}"
        )


def scale(value: float) -> None:
    """The softmax scale is a finite number."""
    if not math.isfinite(value):
        raise ValueError(f"scale must be finite, got {value}")


def _tensor4(name: str, tensor: Tensor) -> None:
    if tensor.dim() != 4:
        raise ValueError(
            f"{name} must have 4 dimensions, [B, T, H, D], got {tensor.dim()}: {list(tensor.shape)}"
        )
    if tensor.dtype not in _DTYPES:
        raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {tensor.dtype}")
    if tensor.shape[3] == 0:
        raise ValueError(f"{name} has head dimension 0: {list(tensor.shape)}")
    if tensor.stride(3) != 1 and tensor.shape[3] > 1:
        raise ValueError(
            f"the last dimension of {name} must be contiguous, got strides "
            f"{list(tensor.stride())}; call .contiguous()"
        )


def _like(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    if other.dtype != tensor.dtype:
        raise TypeError(
            f"{other_name} must have the dtype of {name}, {tensor.dtype}, got {other.dtype}"
        )
    on_device(other_name, other, tensor.device)


def on_device(name: str, tensor: Tensor, device: torch.device) -> None:
    """The tensor is where the call's first tensor is."""
    if tensor.device != device:
        raise ValueError(f"{name} must be on {device}, got {tensor.device}")


def _same(what: str, value: int, other: str, expected: int) -> None:
    if value != expected:
        raise ValueError(f"{what} must equal {other}, {expected}, got {value}")


def _integers(name: str, tensor: Tensor, device: torch.device) -> None:
    if tensor.dtype != torch.int32:
        raise TypeError(f"{name} must be int32, got {tensor.dtype}")
    on_device(name, tensor, device)


def _within(name: str, tensor: Tensor, least: int, most: int) -> None:
    if not tensor.numel():
        return
    low, high = (int(value) for value in tensor.aminmax())
    if low < least or high > most:
        raise ValueError(f"{name} must lie in {least} .. {most}, got {low} .. {high}")


def _readable(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu" or settings.check_device_data()
