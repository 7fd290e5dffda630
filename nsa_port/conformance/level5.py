"""Level 5: long sequences, offsets past 2^31 elements, memory that grows linearly.

Where all rows are too many for the reference, some are compared: a call for those queries alone,
with `positions`. Upstream gradients are 0 elsewhere, so that all gradients are compared in full.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from nsa_port import functional
from nsa_port.backends.interface import Reason, WholeForward
from nsa_port.conformance import hold, memory
from nsa_port.conformance.case import Case, Context, Unsupported
from nsa_port.conformance.inputs import NAMES, Inputs, Shape, like, make, run
from nsa_port.conformance.level1 import inputs
from nsa_port.kernels.geometry import NSAConfig

PAPER = NSAConfig()
_PAST = 2**31
_ROWS = 24
_GROWTH = 1.5
"""An exponent of memory in T nearer to 1 than to 2."""


def _long(context: Context) -> None:
    T = {True: 1024, False: 4096}[context.slow] if context.device.type == "cpu" else 65536
    context.note(f"T={T}, {_ROWS} rows compared")
    given = inputs(context, Shape(T=T, H=4, HK=1, Dk=32, Dv=32, cfg=PAPER))
    leaves = given.leaves()
    got = run(leaves, context.name, needs_grad=True)
    rows = _some_rows(T, context.device)
    part = _rows_of(given, rows)
    out, o_cmp, o_slc, o_win = (tensor.detach()[:, rows] for tensor in got[:4])
    mine = WholeForward(out, o_cmp, o_slc, o_win, got.lse[:, :, rows], got.indices[:, rows])
    hold.outputs(context, part, mine)
    grad = torch.zeros_like(got.out)
    grad[:, rows] = like(mine.out, 99)
    found = dict(zip(NAMES, torch.autograd.grad(got.out, leaves.tensors, grad), strict=True))
    elsewhere = torch.ones(T, dtype=torch.bool, device=context.device)
    elsewhere[rows.long()] = False
    context.require(not found["q"][:, elsewhere].any(), "dq of a row without upstream gradient")
    found |= {name: found[name][:, rows] for name in ("q", "gates")}
    hold.compare_gradients(context, part, mine.indices, grad[:, rows], tuple(found.values()))


def _some_rows(T: int, device: torch.device) -> Tensor:
    """The first, the last, and others between them, ascending."""
    generator = torch.Generator().manual_seed(6)
    between = torch.randperm(T - 2, generator=generator)[: _ROWS - 2] + 1
    return torch.cat((torch.tensor([0, T - 1]), between)).sort().values.to(device, torch.int32)


def _rows_of(given: Inputs, rows: Tensor) -> Inputs:
    return replace(given, q=given.q[:, rows], gates=given.gates[:, rows], positions=rows)


def _long_decode(context: Context) -> None:
    S = {True: 4096, False: 65536}[context.slow] if context.device.type == "cpu" else 262144
    context.note(f"S={S}")
    hold.forward(context, inputs(context, Shape(T=1, S=S, B=2, H=4, HK=1, cfg=PAPER)))


def _far_strides(context: Context) -> None:
    """The tensors' elements lie more than 2^31 elements apart, along tokens or the batch."""
    given = make(Shape(T=130, B=2, H=2, HK=1), context.dtype, context.device)
    _needs(context, (_PAST + 2**26) * given.q.element_size())
    buffer = torch.empty(_PAST + 2**26, dtype=context.dtype, device=context.device)
    for label, along in (("batch", 0), ("tokens", 1)):
        begin = 0

        def far(tensor: Tensor, axis: int = along) -> Tensor:
            nonlocal begin
            strides = list(torch.empty(tensor.shape, device="meta").stride())
            strides[axis] = _PAST // max(tensor.shape[axis] - 1, 1) + 128
            if axis == 1:
                strides[0] = strides[2] * tensor.shape[2]
            moved = buffer.as_strided(tensor.shape, strides, begin)
            begin += 2 ** math.ceil(math.log2(tensor.numel() + 1))
            return moved.copy_(tensor)

        with context.under(f"{label} far apart"):
            moved = replace(given.map(far), gates=given.gates)
            hold.forward(context, moved)
            hold.backward(context, moved)


def _far_outputs(context: Context) -> None:
    """Outputs and the gradient of q have more than 2^31 elements; rows at their end are right."""
    if context.device.type == "cpu":
        raise Unsupported(
            Reason(
                "needs_accelerator",
                "2^31 outputs of attention take a CPU too long",
                value="cpu",
                bound="an accelerator",
                remedy="run level 5 on the accelerator",
            )
        )
    T, heads, cfg = _PAST // (64 * 128) + 512, 64, replace(PAPER, window_size=64)
    _needs(context, 12 * T * heads * 128 * 2)
    given = make(Shape(T=T, H=4, HK=4, Dk=128, Dv=128, cfg=cfg), context.dtype, context.device)
    query = given.q.repeat(1, 1, heads // 4, 1).requires_grad_()
    out, lse = functional.window_attention(
        query, given.k_win, given.v_win, cfg, backend=context.name
    )
    rows = torch.tensor([0, T // 2, T - 2, T - 1], dtype=torch.int32, device=context.device)
    grad = torch.zeros_like(out)
    grad[:, rows] = like(out.detach()[:, rows], 99)
    (gradient,) = torch.autograd.grad(out, query, grad)
    hold.window_rows(
        context,
        replace(given, q=query.detach()[:, rows], positions=rows),
        (out.detach()[:, rows], lse.detach()[:, rows]),
        grad[:, rows],
        gradient[:, rows],
    )


def _far_sum(context: Context) -> None:
    """`combine` of more than 2^31 elements; its inputs are expanded and take no memory."""
    T, H, Dv = _PAST // (64 * 128) + 64, 64, 128
    _needs(context, 6 * T * H * Dv * 2)
    base = make(Shape(T=1, S=64, H=H, HK=1, Dv=Dv), context.dtype, context.device)
    o_cmp, o_slc, o_win = (like(base.q.new_empty(1, 1, H, Dv), seed) for seed in (1, 2, 3))
    small = functional.combine(o_cmp, o_slc, o_win, base.gates, backend=context.name)
    o_cmp, o_slc, o_win = (tensor.expand(1, T, H, Dv) for tensor in (o_cmp, o_slc, o_win))
    gates = base.gates.expand(1, T, H, 3)
    out = functional.combine(o_cmp, o_slc, o_win, gates, backend=context.name)
    for row in (0, T // 2, T - 1):
        context.same(f"row {row}", out[:, row], small[:, 0])


def _needs(context: Context, size: int) -> None:
    """This much memory, or the case is unsupported on this machine."""
    free = memory.free(context.device)
    if free < size:
        raise Unsupported(
            Reason(
                "needs_memory",
                f"the case needs {size / 2**30:.0f} GiB, {free / 2**30:.0f} GiB are free",
                value=f"{free / 2**30:.1f} GiB",
                bound=f"{size / 2**30:.1f} GiB",
                remedy="run level 5 on a larger machine",
            )
        )


def _memory_growth(context: Context) -> None:
    """Peak memory of forward and backward over the inputs, at T and at 4T."""
    T = 4096 if context.device.type == "cpu" else 16384
    if context.slow:
        T = 512
    peaks = [memory.peak(context.name, context.device, context.dtype, n) for n in (T, 4 * T)]
    exponent = math.log(max(peaks[1], 1) / max(peaks[0], 1)) / math.log(4)
    megabytes = ", ".join(f"{peak / 2**20:.0f} MiB" for peak in peaks)
    context.note(f"{megabytes} at T={T}, {4 * T}: grows as T^{exponent:.2f}")
    context.require(
        exponent < _GROWTH,
        f"memory grows as T^{exponent:.2f}: {megabytes} at T={T} and {4 * T}",
    )


def _case(
    name: str,
    title: str,
    check: Callable[[Context], None],
    shows: str,
    dtypes: tuple[torch.dtype, ...],
    peers: str = "",
) -> Case:
    return Case(name, 5, title, shows, check, dtypes=dtypes, peers=peers)


_HALF = (torch.float16, torch.bfloat16)
_PAST_2_31 = "offsets past 2^31 elements"

CASES = (
    _case(
        "long-sequence",
        "A long sequence in the paper's setting, forward and backward",
        _long,
        "results go wrong, or stop, as sequences grow",
        (torch.float32, torch.bfloat16),
    ),
    _case(
        "long-decode",
        "Decode at a long context",
        _long_decode,
        "a long conversation is answered wrong",
        (torch.float32, torch.bfloat16),
    ),
    _case(
        "strides-past-2-31",
        "Inputs whose elements lie more than 2^31 apart",
        _far_strides,
        "an offset overflows 32 bits: an illegal access",
        _HALF,
        _PAST_2_31,
    ),
    _case(
        "attention-past-2-31",
        "Outputs and gradients of more than 2^31 elements",
        _far_outputs,
        "an offset overflows 32 bits: an illegal access",
        (torch.bfloat16,),
        _PAST_2_31,
    ),
    _case(
        "combine-past-2-31",
        "A gated sum of more than 2^31 elements",
        _far_sum,
        "an offset overflows 32 bits: an illegal access",
        (torch.bfloat16,),
        _PAST_2_31,
    ),
    _case(
        "memory-growth",
        "Memory of forward and backward grows linearly in T",
        _memory_growth,
        "a [T, T/16] matrix is stored, and long sequences do not fit",
        (torch.float32,),
    ),
)
