"""The operators' own functions: they pick a form and share what the forms have in common."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from nsa_port.kernels.eager import block_major, few, forms, static
from nsa_port.kernels.eager.pointwise import add_gated, combine
from nsa_port.kernels.eager.rows import accumulation_dtype, delta_of
from nsa_port.kernels.geometry import Layout, NSAConfig
from nsa_port.kernels.results import WholeForward


def compressed_attention(
    q: Tensor, k: Tensor, v: Tensor, config: NSAConfig, layout: Layout, scale: float
) -> tuple[Tensor, Tensor]:
    """Eq. 8: softmax over the compressed blocks that are complete at the query. `out, lse`."""
    out, lse = _form(q).compressed_attention(q, k, v, config, layout, scale)
    return out, lse


def compressed_attention_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    config: NSAConfig,
    layout: Layout,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """`dq, dk, dv`."""
    dq, delta = _start_backward(grad_out, grad_lse, q, out)
    dk, dv = _form(q).compressed_gradients(grad_out, delta, q, k, v, lse, dq, config, layout, scale)
    return dq.to(q.dtype), dk, dv


def select_blocks(
    q: Tensor, k_cmp: Tensor, lse: Tensor, config: NSAConfig, layout: Layout, scale: float
) -> Tensor:
    """Eq. 9 to 12: the blocks each query and KV head attends to. int32 `[B, T, HK, n]`."""
    indices: Tensor = _form(q).select_blocks(q, k_cmp, lse, config, layout, scale)
    return indices


def selected_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    config: NSAConfig,
    layout: Layout,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Eq. 11, 12: one softmax over the tokens of the chosen blocks with key <= p. `out, lse`."""
    out, lse = _form(q).selected_attention(q, k, v, indices, config, layout, scale)
    return out, lse


def selected_attention_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    out: Tensor,
    lse: Tensor,
    config: NSAConfig,
    layout: Layout,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """`dq, dk, dv`; the choice of blocks is not differentiated."""
    dq, delta = _start_backward(grad_out, grad_lse, q, out)
    dk, dv = _form(q).selected_gradients(
        grad_out, delta, q, k, v, indices, lse, dq, config, layout, scale
    )
    return dq.to(q.dtype), dk, dv


def window_attention(
    q: Tensor, k: Tensor, v: Tensor, config: NSAConfig, layout: Layout, scale: float
) -> tuple[Tensor, Tensor]:
    """Section 3.3.3: softmax over the keys with `p - w < key <= p`. `out, lse`."""
    out, lse = _form(q).window_attention(q, k, v, config, layout, scale)
    return out, lse


def window_attention_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    config: NSAConfig,
    layout: Layout,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """`dq, dk, dv`."""
    dq, delta = _start_backward(grad_out, grad_lse, q, out)
    dk, dv = _form(q).window_gradients(grad_out, delta, q, k, v, lse, dq, config, layout, scale)
    return dq.to(q.dtype), dk, dv


def nsa_attention(
    q: Tensor,
    k_cmp: Tensor,
    v_cmp: Tensor,
    k_slc: Tensor,
    v_slc: Tensor,
    k_win: Tensor,
    v_win: Tensor,
    gates: Tensor,
    config: NSAConfig,
    layout: Layout,
    scale: float,
    needs_grad: bool,
) -> WholeForward:
    """Eq. 5. A branch's output lives on only if the backward pass needs it."""
    where = (config, layout, scale)
    if forms.choose(q.device.type, q.shape[1]) is forms.Form.FEW:
        keys = (k_cmp, v_cmp, k_slc, v_slc, k_win, v_win)
        (o_cmp, o_slc, o_win), lses, indices = few.branches(q, *keys, *where)
        out = combine(o_cmp, o_slc, o_win, gates)
        if not needs_grad:
            o_cmp, o_slc, o_win = (q.new_empty(0) for _ in range(3))
        return WholeForward(out, o_cmp, o_slc, o_win, torch.stack(lses), indices)
    form = _form(q)
    o_cmp, lse_cmp, indices = form.compressed_attention_and_blocks(q, k_cmp, v_cmp, *where)
    total = add_gated(None, o_cmp, gates, 0)
    o_cmp = o_cmp if needs_grad else q.new_empty(0)
    o_slc, lse_slc = form.selected_attention(q, k_slc, v_slc, indices, *where)
    add_gated(total, o_slc, gates, 1)
    o_slc = o_slc if needs_grad else q.new_empty(0)
    o_win, lse_win = form.window_attention(q, k_win, v_win, *where)
    add_gated(total, o_win, gates, 2)
    o_win = o_win if needs_grad else q.new_empty(0)
    lse = torch.stack((lse_cmp, lse_slc, lse_win))
    return WholeForward(total.to(q.dtype), o_cmp, o_slc, o_win, lse, indices)


def nsa_attention_backward(
    grad: Tensor,
    q: Tensor,
    k_cmp: Tensor,
    v_cmp: Tensor,
    k_slc: Tensor,
    v_slc: Tensor,
    k_win: Tensor,
    v_win: Tensor,
    gates: Tensor,
    saved: WholeForward,
    config: NSAConfig,
    layout: Layout,
    scale: float,
) -> tuple[Tensor, ...]:
    """`dq, dk_cmp, dv_cmp, dk_slc, dv_slc, dk_win, dv_win, dgates`; all three add to one `dq`."""
    form, dtype = _form(q), accumulation_dtype(q.dtype)
    dq = torch.zeros(q.shape, dtype=dtype, device=q.device)
    dgates = torch.empty(*q.shape[:3], 3, dtype=gates.dtype, device=q.device)
    grads: list[Tensor] = []
    for branch, (gradients, k, v, output) in enumerate(
        (
            (form.compressed_gradients, k_cmp, v_cmp, saved.o_cmp),
            (form.selected_gradients, k_slc, v_slc, saved.o_slc),
            (form.window_gradients, k_win, v_win, saved.o_win),
        )
    ):
        gate = gates[..., branch].to(dtype)
        product = delta_of(grad, None, output, dtype)
        dgates[..., branch] = product
        chosen = (saved.indices,) if branch == 1 else ()
        grads += gradients(
            grad.to(dtype) * gate[..., None],
            product * gate,
            q,
            k,
            v,
            *chosen,
            saved.lse[branch],
            dq,
            config,
            layout,
            scale,
        )
    return (dq.to(q.dtype), *grads, dgates)


def _form(q: Tensor) -> ModuleType:
    form = forms.choose(q.device.type, q.shape[1])
    return block_major if form is forms.Form.BLOCK_MAJOR else static


def _start_backward(
    grad_out: Tensor, grad_lse: Tensor | None, q: Tensor, out: Tensor
) -> tuple[Tensor, Tensor]:
    """Zeros for `dq`, and `delta`."""
    dtype = accumulation_dtype(q.dtype)
    dq = torch.zeros(q.shape, dtype=dtype, device=q.device)
    return dq, delta_of(grad_out, grad_lse, out, dtype)
