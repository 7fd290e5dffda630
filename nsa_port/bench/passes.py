"""The calls that are measured: every operator, the whole, decoding, and dense attention."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import pad, scaled_dot_product_attention

import nsa_port
from nsa_port.bench import floors
from nsa_port.bench.floors import Passes, Work
from nsa_port.bench.shapes import Shape

WHOLE = ("forward", "backward")
"""The groups in which all of NSA takes turns with dense attention."""


@dataclass(frozen=True)
class Measured:
    """One operation that is timed, in turns with others of its `group`.

    `prepare` makes its tensors and gives the call; the forms of dense attention may fail in it.
    """

    group: str
    name: str
    prepare: Callable[[], Callable[[], object]]
    work: Work | None = None


class Operator(NamedTuple):
    """A function, the tensors it takes, and its work."""

    name: str
    function: Callable[..., Tensor]
    tensors: list[Tensor]
    work: Passes


def groups(shape: Shape, *, decode: bool, parts: bool, backward: bool) -> Iterator[list[Measured]]:
    """What is measured in turns; each group's tensors live only while it is measured."""
    if parts:
        for operator in operators(shape):
            yield list(_operator_passes(operator, backward))
    yield from whole(shape, backward)
    if decode:
        yield list(_decode(shape))


def operators(shape: Shape) -> Iterator[Operator]:
    """Every operator on fresh inputs."""
    T, H, Dv = shape.length, shape.heads, shape.value_dim
    config, work = shape.config, floors.operators(shape)
    options: dict[str, Any] = {"backend": shape.backend}
    q = shape.queries(grad=True)
    k, v = shape.keys(grad=True)

    def compress(k: Tensor) -> Tensor:
        return nsa_port.mean_compress(k, config, **options)

    yield Operator("mean_compress", compress, [k], work["mean_compress"])
    with torch.no_grad():
        k_cmp, v_cmp = (compress(x).requires_grad_() for x in (k, v))

    def compressed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return nsa_port.compressed_attention(q, k, v, config, **options)[0]

    name = "compressed_attention"
    yield Operator(name, compressed, [q, k_cmp, v_cmp], work[name])
    with torch.no_grad():
        _, lse = nsa_port.compressed_attention(q, k_cmp, v_cmp, config, **options)

    def select(q: Tensor, k: Tensor) -> Tensor:
        with torch.no_grad():
            return nsa_port.select_blocks(q, k, lse, config, **options)

    yield Operator("select_blocks", select, [q, k_cmp], work["select_blocks"])
    indices = select(q, k_cmp)

    def selected(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return nsa_port.selected_attention(q, k, v, indices, config, **options)[0]

    yield Operator("selected_attention", selected, [q, k, v], work["selected_attention"])

    def window(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return nsa_port.window_attention(q, k, v, config, **options)[0]

    yield Operator("window_attention", window, [q, k, v], work["window_attention"])

    def combined(o_cmp: Tensor, o_slc: Tensor, o_win: Tensor, gates: Tensor) -> Tensor:
        return nsa_port.combine(o_cmp, o_slc, o_win, gates, **options)

    outputs = [shape.random(T, H, Dv, grad=True) for _ in range(3)]
    gates = shape.gates(T, grad=True)
    yield Operator("combine", combined, [*outputs, gates], work["combine"])


def _operator_passes(operator: Operator, backward: bool) -> Iterator[Measured]:
    name, function, tensors, work = operator
    yield Measured(name, "forward", lambda: lambda: function(*tensors), work.forward)
    if backward and work.backward is not None:
        prepare = partial(_backward, lambda: function(*tensors), tensors)
        yield Measured(name, "backward", prepare, work.backward)


def _backward(forward: Callable[[], Tensor], inputs: list[Tensor]) -> Callable[[], object]:
    out = forward()
    grad = torch.randn_like(out)
    return lambda: torch.autograd.grad(out, inputs, grad, retain_graph=True)


@torch.no_grad()
def choice_of_blocks(shape: Shape) -> Tensor:
    """The blocks that queries choose on inputs like those that are measured."""
    options: dict[str, Any] = {"backend": shape.backend}
    q, (k, v) = shape.queries(), shape.keys()
    k_cmp, v_cmp = (nsa_port.mean_compress(x, shape.config, **options) for x in (k, v))
    _, lse = nsa_port.compressed_attention(q, k_cmp, v_cmp, shape.config, **options)
    return nsa_port.select_blocks(q, k_cmp, lse, shape.config, **options)


def nsa(shape: Shape, q: Tensor, k: Tensor, v: Tensor, gates: Tensor) -> Tensor:
    """Compression of k and v, and the attention with one set of keys for all three branches."""
    k_cmp, v_cmp = (nsa_port.mean_compress(x, shape.config, backend=shape.backend) for x in (k, v))
    return nsa_port.nsa_attention(
        q, k_cmp, v_cmp, k, v, k, v, gates, shape.config, backend=shape.backend
    )


def forms(shape: Shape) -> dict[str, tuple[Callable[..., Tensor], Passes]]:
    """NSA and every form of dense attention: functions of `q, k, v, gates`, and their work."""
    found: dict[str, tuple[Callable[..., Tensor], Passes]] = {
        "NSA": (partial(nsa, shape), floors.whole(shape))
    }
    for form in dense_forms(shape):

        def attend(q: Tensor, k: Tensor, v: Tensor, gates: Tensor, form: str = form) -> Tensor:
            return dense(q, k, v, form).transpose(1, 2)

        found[f"dense {form}"] = (attend, floors.dense(shape))
    return found


def whole(shape: Shape, backward: bool) -> Iterator[list[Measured]]:
    """All of NSA and dense attention, forward, then backward."""
    q, (k, v) = shape.queries(grad=backward), shape.keys(grad=backward)
    gates = shape.gates(shape.length, grad=backward)
    every = forms(shape).items()
    yield [
        Measured("forward", name, partial(partial, attend, q, k, v, gates), work.forward)
        for name, (attend, work) in every
    ]
    if backward:
        inputs = {name: [q, k, v, gates] if name == "NSA" else [q, k, v] for name, _ in every}
        yield [
            Measured(
                "backward",
                name,
                partial(_backward, partial(attend, q, k, v, gates), inputs[name]),
                work.backward,
            )
            for name, (attend, work) in every
        ]


def _decode(shape: Shape) -> Iterator[Measured]:
    """One query over a cache whose compressed keys are kept."""
    q, gates = shape.random(1, shape.heads, shape.key_dim), shape.gates(1)
    k, v = shape.keys()
    k_cmp, v_cmp = (nsa_port.mean_compress(x, shape.config, backend=shape.backend) for x in (k, v))
    yield Measured(
        "decode",
        "NSA",
        lambda: (
            lambda: nsa_port.nsa_attention(
                q, k_cmp, v_cmp, k, v, k, v, gates, shape.config, backend=shape.backend
            )
        ),
    )
    for form in dense_forms(shape, decoding=True):
        call = partial(dense, q, k, v, form, causal=False)
        yield Measured("decode", f"dense {form}", partial(partial, call))


def dense_forms(shape: Shape, decoding: bool = False) -> tuple[str, ...]:
    """How PyTorch's dense attention is called: on GPUs with each of its fast kernels forced.

    These are for 16 bits; wider elements take PyTorch's own choice. cuDNN takes keys and values of
    unequal widths; where it does not, and for flash attention, they are padded to one width.
    """
    if torch.device(shape.device).type == "cuda":
        if shape.torch_dtype.itemsize > 2:
            return ("default",)
        unequal = shape.key_dim != shape.value_dim
        return ("flash", "cuDNN", "cuDNN padded") if unequal else ("flash", "cuDNN")
    return ("gqa", "grouped rows") if decoding else ("gqa", "expanded")


def dense(q: Tensor, k: Tensor, v: Tensor, form: str, causal: bool = True) -> Tensor:
    """PyTorch's attention on `[B, T, H, D]`; gives `[B, H, T, Dv]`."""
    value_dim, scale = v.shape[-1], q.shape[-1] ** -0.5
    if form != "cuDNN":
        width = max(q.shape[-1], value_dim)
        padded = (pad(x, (0, width - x.shape[-1])) if x.shape[-1] < width else x for x in (q, k, v))
        q, k, v = padded
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    groups = q.shape[1] // k.shape[1]
    if form == "expanded":
        k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))
    elif form == "grouped rows":  # decoding only: the group's heads as queries of one head
        q = q.reshape(q.shape[0], k.shape[1], groups, q.shape[-1])
    kernel = {"flash": SDPBackend.FLASH_ATTENTION, "cuDNN": SDPBackend.CUDNN_ATTENTION}.get(
        form.split()[0]
    )
    with nullcontext() if kernel is None else sdpa_kernel(kernel):
        out = scaled_dot_product_attention(
            q,
            k,
            v,
            is_causal=causal,
            scale=scale,
            enable_gqa=form not in ("expanded", "grouped rows"),
        )
    return out[..., :value_dim]
