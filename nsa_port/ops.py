"""The `torch.library` operators `torch.ops.nsa_port.*`: schema, fake, dispatch, backward.

An operator's body checks its inputs, asks the registry for a backend, and runs that backend's
kernel; so every switch holds under `torch.compile` too. What differs between operators is only
which tensors they take. Backward runs on the backend that ran forward: eager autograd remembers
it with the forward's output; in a compiled graph, whose backward is traced before anything ran,
the same request is answered again.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from nsa_port import checks, compose, registry
from nsa_port.backends.interface import Problem, WholeForward
from nsa_port.kernels.geometry import Layout, NSAConfig

_WHERE = (
    "int[] config, SymInt num_keys, float scale, Tensor? cu_seqlens, Tensor? cu_seqlens_k, "
    "Tensor? positions, bool needs_grad, str backend"
)
_NUM_WHERE = 8

_library = torch.library.Library("nsa_port", "DEF")


class _Operator:
    """An operator `torch.ops.nsa_port.NAME` for all devices.

    What `torch.library.custom_op` makes, without its checks of every call, which take longer on the
    host than the kernels of a short sequence on the device.
    """

    def __init__(self, name: str, schema: str, body: Callable) -> None:
        self._name = f"nsa_port::{name}"
        _library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        _library.impl(name, body, "CompositeExplicitAutograd")

    def register_fake(self, fake: Callable) -> None:
        torch.library.register_fake(self._name, fake, lib=_library)

    def register_autograd(self, backward: Callable, setup_context: Callable) -> None:
        torch.library.register_autograd(
            self._name, backward, setup_context=setup_context, lib=_library
        )


def _operator(name: str, schema: str) -> Callable[[Callable], _Operator]:
    return lambda body: _Operator(name, schema, body)


def _eager(operator: Any, setup: Callable, backward: Callable) -> type[torch.autograd.Function]:
    """An operator with the same gradients as `register_autograd` gives it, in half the host time.

    `register_autograd` looks at every argument of the schema anew at each call.
    """

    class Eager(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> Any:
            with torch._C._AutoDispatchBelowAutograd():
                output = operator(*inputs)
            setup(ctx, inputs, output)
            return output

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            return backward(ctx, *grads)

    return Eager


def _run_operator(
    operator: Any, eager: type[torch.autograd.Function], inputs: tuple, needs_grad: bool
) -> Any:
    """The operator by its shortest way: past what autograd does with it where nothing is traced.

    The transforms of `torch.func` are autograd too, and take nothing but the operator itself.
    """
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return operator(*inputs)
    if needs_grad:
        return eager.apply(*inputs)
    with torch._C._AutoDispatchBelowAutograd():
        return operator(*inputs)


_ran: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
"""Output tensor -> the backend that made it, in the grammar of `NSA_PORT_BACKEND`."""


def _problem(
    operator: str,
    named: dict[str, Tensor],
    config: NSAConfig,
    layout: Layout,
    needs_grad: bool,
) -> Problem:
    """What the registry decides on; `named` are the tensors: queries, keys, values come first.

    Operators without keys or values have the sizes of their last tensor there.
    """
    dtype = next(iter(named.values())).dtype
    shapes = tuple([(name, tensor.shape) for name, tensor in named.items()])
    positions = layout.positions is not None
    where = (layout.num_keys, layout.packed, positions, needs_grad, config)
    return _known_problem(operator, dtype, shapes, *where)


@functools.lru_cache(maxsize=1024)
def _known_problem(
    operator: str,
    dtype: torch.dtype,
    shapes: tuple[tuple[str, torch.Size], ...],
    num_keys: int,
    packed: bool,
    positions: bool,
    needs_grad: bool,
    config: NSAConfig,
) -> Problem:
    """The same object for the same call, which the registry then knows sooner."""
    q, k, v = (shapes[min(i, len(shapes) - 1)][1] for i in range(3))
    return Problem(
        operator=operator,
        dtype=dtype,
        batch=q[0],
        num_queries=q[1],
        num_keys=num_keys,
        heads=q[2],
        kv_heads=k[2],
        key_dim=q[3],
        value_dim=v[3],
        packed=packed,
        positions=positions,
        needs_grad=needs_grad,
        config=config,
        shapes=tuple((name, tuple(shape)) for name, shape in shapes),
    )


def _kernels_only(device: torch.device) -> AbstractContextManager:
    """Neither autograd nor autocast reaches into a kernel: it decides its own dtypes."""
    if not torch.is_autocast_enabled(device.type):
        return torch.no_grad()
    return _without_autocast(device.type)


@contextmanager
def _without_autocast(device_type: str) -> Iterator[None]:
    with torch.no_grad(), torch.autocast(device_type, enabled=False):
        yield


def _run(problem: Problem, device: torch.device, backend: str, *args: Any) -> tuple[Any, str]:
    """The result of the chosen backend's kernel, and the backend's name."""
    chosen = registry.choose(problem, device, backend)
    with _kernels_only(device):
        return registry.kernel(chosen, problem.operator, device)(*args), chosen.name


def _run_backward(operator: str, backend: str, problem: Problem, *args: Any) -> Any:
    device = args[0].device
    chosen = registry.choose(problem, device, backend)
    with _kernels_only(device):
        return registry.kernel(chosen, operator, device, "_backward")(*args)


def _one_device(names: Sequence[str], tensors: Sequence[Tensor]) -> None:
    """Fakes check this too: PyTorch asks them, not the body, when any tensor is a meta tensor."""
    for name, tensor in zip(names, tensors, strict=True):
        checks.on_device(name, tensor, tensors[0].device)


def _lse_dtype(q: Tensor) -> torch.dtype:
    return torch.promote_types(q.dtype, torch.float32)


# --------------------------------------------------------------------------- attention


def _attention_body(
    operator: str, q: Tensor, k: Tensor, v: Tensor, indices: Tensor | None, where: tuple
) -> tuple[Tensor, Tensor]:
    config, layout, scale, needs_grad, backend = _unpack(where)
    compressed = operator == "compressed_attention"
    checks.queries(q)
    checks.keys(q, k, v, ("k_cmp", "v_cmp") if compressed else ("k", "v"))
    checks.layout(layout, q.shape[0], q.shape[1], None if compressed else k.shape[1], q.device)
    checks.scale(scale)
    if compressed:
        checks.num_blocks(k, config, layout)
    if indices is not None:
        checks.indices(indices, k, q.shape[1], config, layout)
    named = {"q": q, "k": k, "v": v} | ({} if indices is None else {"idx": indices})
    problem = _problem(operator, named, config, layout, needs_grad)
    given = (q, k, v) if indices is None else (q, k, v, indices)
    (out, lse), name = _run(problem, q.device, backend, *given, config, layout, scale)
    _ran[lse] = name
    return out, lse


def _unpack(where: Sequence[Any]) -> tuple[NSAConfig, Layout, float, bool, str]:
    config, num_keys, scale, cu_seqlens, cu_seqlens_k, positions, needs_grad, backend = where
    layout = Layout(num_keys, cu_seqlens, cu_seqlens_k, positions)
    return NSAConfig.from_ints(config), layout, scale, needs_grad, backend


def _define_attention(operator: str, *, with_indices: bool) -> None:
    """Define `nsa_port::operator` and `nsa_port::operator_backward`, `out, lse` of q, k, v."""
    count = 4 if with_indices else 3
    tensors = "Tensor q, Tensor k, Tensor v" + (", Tensor idx" if with_indices else "")

    def body(*args: Any) -> tuple[Tensor, Tensor]:
        indices = args[3] if with_indices else None
        return _attention_body(operator, args[0], args[1], args[2], indices, args[count:])

    def fake(*args: Any) -> tuple[Tensor, Tensor]:
        q, _, v = args[:3]
        _one_device(("q", "k", "v", "idx")[:count], args[:count])
        return (
            q.new_empty(*q.shape[:3], v.shape[3]),
            q.new_empty(q.shape[:3], dtype=_lse_dtype(q)),
        )

    def backward_body(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
        (grad_out, grad_lse), args = args[:2], args[2:]
        given, (out, lse), where = args[:count], args[count : count + 2], args[count + 2 :]
        config, layout, scale, needs_grad, backend = _unpack(where)
        q, k, v = given[:3]
        problem = _problem(operator, {"q": q, "k": k, "v": v}, config, layout, needs_grad)
        return _run_backward(
            operator, backend, problem, grad_out, grad_lse, *given, out, lse, config, layout, scale
        )

    def backward_fake(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
        return _empty(args[2]), _empty(args[3]), _empty(args[4])

    def setup(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
        ctx.set_materialize_grads(False)
        _save(ctx, inputs[:count], output, inputs[count:], ran=output[1])

    def autograd(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple:
        *given, out, lse, cu_seqlens, cu_seqlens_k, positions = ctx.saved_tensors
        if grad_out is None:
            grad_out = torch.zeros_like(out)
        grads = getattr(torch.ops.nsa_port, f"{operator}_backward")(
            _contiguous_last(grad_out),
            grad_lse,
            *given,
            out,
            lse,
            *_restore(ctx, cu_seqlens, cu_seqlens_k, positions),
        )
        return (*grads, *(None,) * (count - 3 + _NUM_WHERE))

    forward_op = _Operator(operator, f"({tensors}, {_WHERE}) -> (Tensor, Tensor)", body)
    forward_op.register_fake(fake)
    forward_op.register_autograd(autograd, setup_context=setup)
    _Operator(
        f"{operator}_backward",
        f"(Tensor grad_out, Tensor? grad_lse, {tensors}, Tensor out, Tensor lse, {_WHERE})"
        " -> (Tensor, Tensor, Tensor)",
        backward_body,
    ).register_fake(backward_fake)


def _save(
    ctx: Any, given: Sequence[Tensor], outputs: Sequence[Tensor], where: Sequence, ran: Tensor
) -> None:
    config, num_keys, scale, cu_seqlens, cu_seqlens_k, positions, needs_grad, backend = where
    if not needs_grad:
        raise RuntimeError("an operator called with needs_grad=False cannot be differentiated")
    ctx.save_for_backward(*given, *outputs, cu_seqlens, cu_seqlens_k, positions)
    ctx.where = config, num_keys, scale
    ctx.backend = _ran.get(ran, backend)


def _restore(ctx: Any, cu_seqlens: Any, cu_seqlens_k: Any, positions: Any) -> tuple:
    return (*ctx.where, cu_seqlens, cu_seqlens_k, positions, True, ctx.backend)


def _empty(tensor: Tensor) -> Tensor:
    """A gradient's fake: contiguous, whatever the strides of the input."""
    return tensor.new_empty(tensor.shape)


def _contiguous_last(grad: Tensor) -> Tensor:
    """Kernels need a contiguous last dimension; autograd may hand over an expanded scalar."""
    return grad if grad.stride(-1) == 1 else grad.contiguous()


_define_attention("compressed_attention", with_indices=False)
_define_attention("selected_attention", with_indices=True)
_define_attention("window_attention", with_indices=False)


# --------------------------------------------------------------------------- selection


@_operator(
    "select_blocks",
    f"(Tensor q, Tensor k_cmp, Tensor lse, {_WHERE}) -> Tensor",
)
def select_blocks(q: Tensor, k_cmp: Tensor, lse: Tensor, *where: Any) -> Tensor:
    config, layout, scale, needs_grad, backend = _unpack(where)
    checks.queries(q)
    checks.keys(q, k_cmp, None, ("k_cmp", ""))
    checks.layout(layout, q.shape[0], q.shape[1], None, q.device)
    checks.num_blocks(k_cmp, config, layout)
    checks.log_sum_exp(lse, q)
    checks.scale(scale)
    named = {"q": q, "k_cmp": k_cmp}
    problem = _problem("select_blocks", named, config, layout, needs_grad)
    return _run(problem, q.device, backend, q, k_cmp, lse, config, layout, scale)[0]


@select_blocks.register_fake
def _(q: Tensor, k_cmp: Tensor, lse: Tensor, config: list[int], *where: Any) -> Tensor:
    _one_device(("q", "k_cmp", "lse"), (q, k_cmp, lse))
    shape = (*q.shape[:2], k_cmp.shape[2], NSAConfig.from_ints(config).num_selected)
    return q.new_empty(shape, dtype=torch.int32)


# --------------------------------------------------------------------------- compression


@_operator(
    "mean_compress",
    "(Tensor k, int[] config, Tensor? cu_seqlens, SymInt? num_blocks, str backend) -> Tensor",
)
def mean_compress(
    k: Tensor, config: list[int], cu_seqlens: Tensor | None, num_blocks: int | None, backend: str
) -> Tensor:
    cfg, layout = NSAConfig.from_ints(config), Layout(k.shape[1], cu_seqlens, cu_seqlens)
    checks.queries(k)
    checks.layout(layout, k.shape[0], k.shape[1], k.shape[1], k.device)
    if num_blocks is None:
        num_blocks = _count_blocks(cfg, layout)
    problem = _problem("mean_compress", {"k": k}, cfg, layout, k.requires_grad)
    out, name = _run(problem, k.device, backend, k, cfg, layout, num_blocks)
    _ran[out] = name
    return out


def _count_blocks(config: NSAConfig, layout: Layout) -> int:
    """The exact number of compressed blocks; for packed device tensors this synchronises."""
    if not layout.packed:
        return config.num_compressed(layout.num_keys)
    return int(layout.compressed_cu_seqlens(config)[-1])


@mean_compress.register_fake
def _(
    k: Tensor, config: list[int], cu_seqlens: Tensor | None, num_blocks: int | None, backend: str
) -> Tensor:
    cfg = NSAConfig.from_ints(config)
    rows: int | torch.SymInt | None = num_blocks
    if rows is None and cu_seqlens is not None:
        rows = torch.library.get_ctx().new_dynamic_size()
    elif rows is None:
        rows = torch.sym_max(
            (k.shape[1] - cfg.block_size + cfg.block_stride) // cfg.block_stride, 0
        )
    return k.new_empty((k.shape[0], rows, k.shape[2], k.shape[3]))


@_operator(
    "mean_compress_backward",
    "(Tensor grad, Tensor k, int[] config, Tensor? cu_seqlens, str backend) -> Tensor",
)
def mean_compress_backward(
    grad: Tensor, k: Tensor, config: list[int], cu_seqlens: Tensor | None, backend: str
) -> Tensor:
    cfg, layout = NSAConfig.from_ints(config), Layout(k.shape[1], cu_seqlens, cu_seqlens)
    problem = _problem("mean_compress", {"k": k}, cfg, layout, True)
    return _run_backward("mean_compress", backend, problem, grad, cfg, layout)


@mean_compress_backward.register_fake
def _(
    grad: Tensor, k: Tensor, config: list[int], cu_seqlens: Tensor | None, backend: str
) -> Tensor:
    return _empty(k)


def _mean_compress_setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    k, config, cu_seqlens, _, backend = inputs
    ctx.save_for_backward(k, cu_seqlens)
    ctx.config, ctx.backend = config, _ran.get(output, backend)


def _mean_compress_autograd(ctx: Any, grad: Tensor) -> tuple:
    k, cu_seqlens = ctx.saved_tensors
    dk = torch.ops.nsa_port.mean_compress_backward(
        _contiguous_last(grad), k, ctx.config, cu_seqlens, ctx.backend
    )
    return dk, None, None, None, None


mean_compress.register_autograd(_mean_compress_autograd, setup_context=_mean_compress_setup)

_EagerMeanCompress = _eager(
    torch.ops.nsa_port.mean_compress, _mean_compress_setup, _mean_compress_autograd
)


def run_mean_compress(k: Tensor, *others: Any) -> Tensor:
    """`torch.ops.nsa_port.mean_compress`, by the shortest way where nothing is traced."""
    needs_grad = k.requires_grad and torch.is_grad_enabled()
    result: Tensor = _run_operator(
        torch.ops.nsa_port.mean_compress, _EagerMeanCompress, (k, *others), needs_grad
    )
    return result


# --------------------------------------------------------------------------- gates


@_operator(
    "combine",
    "(Tensor o_cmp, Tensor o_slc, Tensor o_win, Tensor gates, str backend) -> Tensor",
)
def combine(o_cmp: Tensor, o_slc: Tensor, o_win: Tensor, gates: Tensor, backend: str) -> Tensor:
    checks.branches(o_cmp, o_slc, o_win)
    checks.gates(gates, tuple(o_cmp.shape[:3]), o_cmp.device)
    expanded = gates.expand(*o_cmp.shape[:3], 3)
    problem = _combine_problem(o_cmp, o_cmp.requires_grad)
    out, name = _run(problem, o_cmp.device, backend, o_cmp, o_slc, o_win, expanded)
    _ran[out] = name
    return out


_NO_CONFIG = NSAConfig()
"""`combine` has no blocks; whatever a backend's choice depends on, this is not it."""


def _combine_problem(o_cmp: Tensor, needs_grad: bool) -> Problem:
    layout = Layout(o_cmp.shape[1])
    return _problem("combine", {"o_cmp": o_cmp}, _NO_CONFIG, layout, needs_grad)


@combine.register_fake
def _(o_cmp: Tensor, o_slc: Tensor, o_win: Tensor, gates: Tensor, backend: str) -> Tensor:
    _one_device(("o_cmp", "o_slc", "o_win", "gates"), (o_cmp, o_slc, o_win, gates))
    return _empty(o_cmp)


@_operator(
    "combine_backward",
    "(Tensor grad, Tensor o_cmp, Tensor o_slc, Tensor o_win, Tensor gates, str backend) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
)
def combine_backward(
    grad: Tensor, o_cmp: Tensor, o_slc: Tensor, o_win: Tensor, gates: Tensor, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    problem = _combine_problem(o_cmp, True)
    expanded = gates.expand(*o_cmp.shape[:3], 3)
    *grads, dgates = _run_backward("combine", backend, problem, grad, o_cmp, o_slc, o_win, expanded)
    return (*grads, _sum_to(dgates, gates))


def _sum_to(dgates: Tensor, gates: Tensor) -> Tensor:
    """The gradient of gates before they were broadcast."""
    total = dgates.sum_to_size(gates.shape) if dgates.shape != gates.shape else dgates
    return total.to(gates.dtype).contiguous()


@combine_backward.register_fake
def _(
    grad: Tensor, o_cmp: Tensor, o_slc: Tensor, o_win: Tensor, gates: Tensor, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _empty(o_cmp), _empty(o_slc), _empty(o_win), _empty(gates)


def _combine_setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:4])
    ctx.backend = _ran.get(output, inputs[4])


def _combine_autograd(ctx: Any, grad: Tensor) -> tuple:
    grads = torch.ops.nsa_port.combine_backward(
        _contiguous_last(grad), *ctx.saved_tensors, ctx.backend
    )
    return (*grads, None)


combine.register_autograd(_combine_autograd, setup_context=_combine_setup)


# --------------------------------------------------------------------------- the whole

_INPUTS = ("q", "k_cmp", "v_cmp", "k_slc", "v_slc", "k_win", "v_win", "gates")
_TENSORS = ", ".join(f"Tensor {name}" for name in _INPUTS)
_SAVED = "Tensor o_cmp, Tensor o_slc, Tensor o_win, Tensor lse, Tensor indices"


def whole_problem(
    tensors: Sequence[Tensor], config: NSAConfig, layout: Layout, grad: bool
) -> Problem:
    named = dict(zip(_INPUTS, tensors, strict=True))
    return _problem("nsa_attention", named, config, layout, grad)


@_operator(
    "nsa_attention",
    f"({_TENSORS}, {_WHERE}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def nsa_attention(*args: Any) -> WholeForward:
    """`out, o_cmp, o_slc, o_win, lse [3, B, T, H], indices`; see `WholeForward`."""
    tensors, where = args[: len(_INPUTS)], args[len(_INPUTS) :]
    q, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, gates = tensors
    config, layout, scale, needs_grad, backend = _unpack(where)
    checks.queries(q)
    for name, k, v in (("cmp", k_cmp, v_cmp), ("slc", k_slc, v_slc), ("win", k_win, v_win)):
        checks.keys(q, k, v, (f"k_{name}", f"v_{name}"))
        checks.same_heads(k_cmp, v_cmp, k, v, f"k_{name}")
    if k_slc.shape[1] != k_win.shape[1]:
        raise ValueError(
            f"k_slc and k_win must be as long, got {k_slc.shape[1]} and {k_win.shape[1]}"
        )
    checks.layout(layout, q.shape[0], q.shape[1], k_slc.shape[1], q.device)
    checks.num_blocks(k_cmp, config, layout)
    checks.gates(gates, tuple(q.shape[:3]), q.device)
    checks.scale(scale)
    problem = whole_problem(tensors, config, layout, needs_grad)
    chosen = registry.choose_parts(problem, q.device, backend)
    expanded = gates.expand(*q.shape[:3], 3)
    given = (*tensors[:-1], expanded, config, layout, scale, needs_grad)
    with _kernels_only(q.device):
        fused = compose.fused_backend(chosen)
        if fused is not None:
            result: WholeForward = registry.kernel(fused, "nsa_attention", q.device)(*given)
        else:
            result = compose.forward(chosen, *given)
    _ran[result.lse] = compose.describe(chosen)
    return WholeForward(*result)


@nsa_attention.register_fake
def _(*args: Any) -> WholeForward:
    _one_device(_INPUTS, args[: len(_INPUTS)])
    q, v = args[0], args[2]
    config, needs_grad = NSAConfig.from_ints(args[len(_INPUTS)]), args[-2]
    B, T, H, _ = q.shape
    out = q.new_empty(B, T, H, v.shape[3])
    o_cmp, o_slc, o_win = (_empty(out) if needs_grad else q.new_empty(0) for _ in range(3))
    lse = q.new_empty(3, B, T, H, dtype=_lse_dtype(q))
    indices = q.new_empty(B, T, v.shape[2], config.num_selected, dtype=torch.int32)
    return WholeForward(out, o_cmp, o_slc, o_win, lse, indices)


@_operator(
    "nsa_attention_backward",
    f"(Tensor grad, {_TENSORS}, {_SAVED}, {_WHERE}) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def nsa_attention_backward(grad: Tensor, *args: Any) -> tuple[Tensor, ...]:
    tensors, args = args[: len(_INPUTS)], args[len(_INPUTS) :]
    saved, where = WholeForward._make((grad, *args[:5])), args[5:]
    config, layout, scale, needs_grad, backend = _unpack(where)
    q, gates = tensors[0], tensors[-1]
    problem = whole_problem(tensors, config, layout, needs_grad)
    chosen = registry.choose_parts(problem, q.device, backend)
    expanded = gates.expand(*q.shape[:3], 3)
    given = (grad, *tensors[:-1], expanded, saved, config, layout, scale)
    with _kernels_only(q.device):
        fused = compose.fused_backend(chosen)
        if fused is not None:
            run = registry.kernel(fused, "nsa_attention", q.device, "_backward")
            *grads, dgates = run(*given)
        else:
            *grads, dgates = compose.backward(chosen, *given)
    return (*grads, _sum_to(dgates, gates))


@nsa_attention_backward.register_fake
def _(grad: Tensor, *args: Any) -> tuple[Tensor, ...]:
    return tuple(_empty(tensor) for tensor in args[: len(_INPUTS)])


def _whole_setup(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    tensors, where = inputs[: len(_INPUTS)], inputs[len(_INPUTS) :]
    lse, indices = output[4:]
    ctx.mark_non_differentiable(*output[1:])
    # Zeros for what is not differentiated would be three more branch outputs in memory.
    ctx.set_materialize_grads(False)
    _save(ctx, tensors, (*output[1:4], lse, indices), where, ran=lse)


def _whole_autograd(ctx: Any, grad: Tensor, *_: Any) -> tuple:
    *given, cu_seqlens, cu_seqlens_k, positions = ctx.saved_tensors
    grads = torch.ops.nsa_port.nsa_attention_backward(
        _contiguous_last(grad), *given, *_restore(ctx, cu_seqlens, cu_seqlens_k, positions)
    )
    return (*grads, *(None,) * _NUM_WHERE)


nsa_attention.register_autograd(_whole_autograd, setup_context=_whole_setup)


_EagerWhole = _eager(torch.ops.nsa_port.nsa_attention, _whole_setup, _whole_autograd)


def run_whole(*inputs: Any) -> tuple[Tensor, ...]:
    """`torch.ops.nsa_port.nsa_attention`, by the shortest way where nothing is traced."""
    result: tuple[Tensor, ...] = _run_operator(
        torch.ops.nsa_port.nsa_attention, _EagerWhole, inputs, needs_grad=inputs[-2]
    )
    return result
