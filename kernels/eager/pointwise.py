"""Mean compression (Eq. 7) and the gated sum (Eq. 5), forward and backward, for every device."""

from __future__ import annotations

import torch
from torch import Tensor

from nsa_port.kernels.eager.rows import accumulation_dtype, chunks, element_budget
from nsa_port.kernels.geometry import Layout, NSAConfig


def mean_compress(x: Tensor, config: NSAConfig, layout: Layout, num_blocks: int) -> Tensor:
    """Block i is the mean of tokens `[i d, i d + l)` of its sequence. `[B, num_blocks, HK, D]`."""
    y = x.new_zeros(x.shape[0], num_blocks, *x.shape[2:])
    if layout.packed:
        source, owned = _tokens_of_blocks(layout, config, num_blocks, x.device)
        if source is None:
            return y
        row = x.shape[0] * x.shape[2] * x.shape[3] * config.block_size
        for a, b in chunks(num_blocks, row, element_budget(x.device)):
            tokens = x[:, source[a:b].flatten()].unflatten(1, (b - a, config.block_size))
            mean = tokens.mean(2, dtype=accumulation_dtype(x.dtype))
            y[:, a:b] = mean.masked_fill_(~owned[a:b, None, None], 0)
        return y
    count = min(num_blocks, config.num_compressed(x.shape[1]))
    if count == 0:
        return y
    d, per_block = config.block_stride, config.block_size // config.block_stride
    strides = count + per_block - 1
    sums = x[:, : strides * d].unflatten(1, (strides, d)).sum(2, dtype=accumulation_dtype(x.dtype))
    total = sums[:, :count].clone()
    for part in range(1, per_block):
        total += sums[:, part : part + count]
    y[:, :count] = total.div_(config.block_size)
    return y


def mean_compress_backward(grad: Tensor, config: NSAConfig, layout: Layout) -> Tensor:
    """Each token gathers `1 / l` of the gradient of every block it is in. `[B, S, HK, D]`."""
    B, num_blocks = grad.shape[:2]
    S, d = layout.num_keys, config.block_stride
    per_block = config.block_size // d
    dtype = accumulation_dtype(grad.dtype)
    if layout.packed:
        return _packed_mean_backward(grad, config, layout, dtype)
    dx = grad.new_zeros(B, S, *grad.shape[2:])
    count = min(num_blocks, config.num_compressed(S))
    if count == 0:
        return dx
    share = grad[:, :count].to(dtype) / config.block_size
    strides = count + per_block - 1
    per_stride = share.new_zeros(B, strides, *grad.shape[2:])
    for part in range(per_block):
        per_stride[:, part : part + count] += share
    dx[:, : strides * d].unflatten(1, (strides, d)).copy_(per_stride.unsqueeze(2))
    return dx


def combine(o_cmp: Tensor, o_slc: Tensor, o_win: Tensor, gates: Tensor) -> Tensor:
    """`g_cmp o_cmp + g_slc o_slc + g_win o_win`, summed in float32 or better."""
    total: Tensor | None = None
    for branch, output in enumerate((o_cmp, o_slc, o_win)):
        total = add_gated(total, output, gates, branch)
    assert total is not None
    return total.to(o_cmp.dtype)


def add_gated(total: Tensor | None, output: Tensor, gates: Tensor, branch: int) -> Tensor:
    """`total + gate * output`, in place where there is a total already."""
    dtype = accumulation_dtype(output.dtype)
    gate = gates[..., branch, None].to(dtype)
    if total is None:
        return output.to(dtype) * gate
    return total.addcmul_(output.to(dtype), gate)


def combine_backward(
    grad: Tensor, o_cmp: Tensor, o_slc: Tensor, o_win: Tensor, gates: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`d_branch = gate * grad`, `dgates = sum over channels of output * grad`."""
    dtype = accumulation_dtype(grad.dtype)
    outputs = (o_cmp, o_slc, o_win)
    wide = grad.to(dtype)
    d_cmp, d_slc, d_win = (
        (wide * gates[..., branch, None].to(dtype)).to(grad.dtype) for branch in range(3)
    )
    dgates = torch.stack([(wide * output.to(dtype)).sum(-1) for output in outputs], dim=-1)
    return d_cmp, d_slc, d_win, dgates.to(gates.dtype)


def _tokens_of_blocks(
    layout: Layout, config: NSAConfig, num_blocks: int, device: torch.device
) -> tuple[Tensor | None, Tensor]:
    """`[num_blocks, l]` tokens of each packed block, in bounds, and whether the block exists."""
    assert layout.cu_seqlens_k is not None
    starts = layout.compressed_cu_seqlens(config).long()
    block = torch.arange(num_blocks, device=device)
    owned = block < starts[-1]
    if starts.shape[0] == 1 or layout.num_keys == 0:
        return None, owned
    sequence = torch.searchsorted(starts[1:], block, right=True).clamp(max=starts.shape[0] - 2)
    local = block - starts[sequence]
    first = layout.cu_seqlens_k.long()[sequence] + local * config.block_stride
    token = first[:, None] + torch.arange(config.block_size, device=device)
    return token.clamp(0, layout.num_keys - 1), owned


def _packed_mean_backward(
    grad: Tensor, config: NSAConfig, layout: Layout, dtype: torch.dtype
) -> Tensor:
    assert layout.cu_seqlens_k is not None
    S, device = layout.num_keys, grad.device
    dx = grad.new_zeros(grad.shape[0], S, *grad.shape[2:], dtype=dtype)
    if S == 0 or grad.shape[1] == 0 or layout.cu_seqlens_k.shape[0] == 1:
        return dx.to(grad.dtype)
    cu_seqlens, starts = layout.cu_seqlens_k.long(), layout.compressed_cu_seqlens(config).long()
    sequence = Layout.sequence_of(cu_seqlens, S).clamp(max=cu_seqlens.shape[0] - 2)
    newest = (torch.arange(S, device=device) - cu_seqlens[sequence]) // config.block_stride
    count = starts[sequence + 1] - starts[sequence]
    for age in range(config.block_size // config.block_stride):
        local = newest - age
        inside = (local >= 0) & (local < count)
        block = (starts[sequence] + local).clamp(0, grad.shape[1] - 1)
        part = grad[:, block].to(dtype).masked_fill_(~inside[:, None, None], 0)
        dx += part
    return dx.div_(config.block_size).to(grad.dtype)
