"""Level 4: results do not depend on anything they should not depend on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from nsa_port.backends.interface import Reason
from nsa_port.conformance import hold
from nsa_port.conformance.case import Case, Context, Unsupported
from nsa_port.conformance.inputs import COMPACT, NAMES, Inputs, Shape, like, run
from nsa_port.conformance.level1 import inputs
from nsa_port.conformance.poison import allocator_holds, uninitialised_memory_is_nan

_REPEATS = 4
_PACKED = ((40, 40), (0, 0), (90, 90), (70, 70))


def _forward_repeats(context: Context) -> None:
    given = inputs(context, Shape(B=2))
    first = run(given, context.name, needs_grad=True)
    for at in range(2, _REPEATS + 1):
        again = run(given, context.name, needs_grad=True)
        for name in first._fields:
            context.same(f"{name} of run {at}", getattr(again, name), getattr(first, name))


def _backward_repeats(context: Context) -> None:
    for label, shape in (("dense", Shape(B=2)), ("packed", Shape(lengths=_PACKED))):
        given = inputs(context, shape)
        first = _gradients(context, given)
        for at in range(2, _REPEATS + 1):
            for name, a, b in zip(NAMES, _gradients(context, given), first, strict=True):
                context.same(f"{label}: d{name} of run {at}", a, b)


def _gradients(context: Context, given: Inputs) -> tuple[Tensor, ...]:
    leaves = given.leaves()
    out = hold.function(context, leaves)
    return torch.autograd.grad(out, leaves.tensors, like(out, 99))


def _causal(context: Context) -> None:
    """Change every input that comes after a query, and every block complete only after it."""
    given = inputs(context)
    before = run(given, context.name, needs_grad=True)
    for p in (0, 14, 15, 31, 63, 64, 100, 233):
        blocks = given.cfg.num_compressed(p + 1)
        later = given.map(lambda tensor: tensor.clone())
        for name in NAMES:
            tensor = getattr(later, name)
            tensor[:, (blocks if name.endswith("cmp") else p + 1) :] += 3
        after = run(later, context.name, needs_grad=True)
        for name in ("out", "o_cmp", "o_slc", "o_win", "indices"):
            a, b = (getattr(result, name)[:, : p + 1] for result in (after, before))
            context.same(f"{name} up to {p}, all later inputs changed", a, b)
        lse_after, lse_before = after.lse[:, :, : p + 1], before.lse[:, :, : p + 1]
        context.same(f"lse up to {p}, all later inputs changed", lse_after, lse_before)


def _gradients_are_causal(context: Context) -> None:
    """The loss of rows up to p has no gradient in any later input."""
    given = inputs(context).leaves()
    out = hold.function(context, given)
    for p in (0, 40, 150):
        found = torch.autograd.grad(out[:, : p + 1].sum(), given.tensors, retain_graph=True)
        blocks = COMPACT.num_compressed(p + 1)
        for name, grad in zip(NAMES, found, strict=True):
            later = grad[:, (blocks if name.endswith("cmp") else p + 1) :]
            context.require(not later.any(), f"d{name} past {p} is not 0")


def _other_entries(context: Context) -> None:
    """Change everything in the other batch entries, then put NaN there."""
    given = inputs(context, Shape(T=150, B=3))
    before = run(given, context.name, needs_grad=True)
    gradients = _gradients(context, given)
    for label, value in (("changed", 7.0), ("NaN", torch.nan)):
        other = given.map(lambda tensor: tensor.clone())
        for tensor in other.tensors:
            tensor[::2] += value
        after = run(other, context.name, needs_grad=True)
        with context.under(f"other entries {label}"):
            context.same("out", after.out[1], before.out[1])
            context.same("indices", after.indices[1], before.indices[1])
            found = _gradients(context, other)
            for name, a, b in zip(NAMES, found, gradients, strict=True):
                context.same(f"d{name}", a[1], b[1])


def _other_sequences(context: Context) -> None:
    """Change everything in the other packed sequences, then put NaN there."""
    given = inputs(context, Shape(lengths=_PACKED))
    mine = slice(40, 130)
    blocks = slice(COMPACT.num_compressed(40), COMPACT.num_compressed(40) + 10)
    assert COMPACT.num_compressed(90) == 10
    before = run(given, context.name, needs_grad=True)
    gradients = _gradients(context, given)
    for label, value in (("changed", 7.0), ("NaN", torch.nan)):
        other = given.map(lambda tensor: tensor.clone())
        for tensor in other.tensors:
            tensor += value
        for name in NAMES:
            own = blocks if name.endswith("cmp") else mine
            getattr(other, name)[:, own] = getattr(given, name)[:, own]
        after = run(other, context.name, needs_grad=True)
        with context.under(f"other sequences {label}"):
            context.same("out", after.out[:, mine], before.out[:, mine])
            context.same("indices", after.indices[:, mine], before.indices[:, mine])
            found = _gradients(context, other)
            for name, a, b in zip(NAMES, found, gradients, strict=True):
                own = blocks if name.endswith("cmp") else mine
                context.same(f"d{name}", a[:, own], b[:, own])


def _batch_invariance(context: Context) -> None:
    """An entry alone, and the same entry in a batch: the same choice, both within tolerance."""
    given = inputs(context, Shape(T=150, B=5))
    whole = hold.forward(context, given)
    equal = True
    for entry in range(5):
        alone = given.map(lambda tensor, at=entry: tensor[at : at + 1])  # type: ignore[misc]
        with context.under(f"entry {entry} alone"):
            got = hold.forward(context, alone)
            context.same("choice of blocks", got.indices[0], whole.indices[entry])
        equal = equal and torch.equal(got.out[0], whole.out[entry])
    context.note(f"alone and in a batch {'equal to the bit' if equal else 'equal within budget'}")


def _chunks(context: Context) -> None:
    """One prefill; chunks of several sizes; token by token. Keys grow as they would in a cache."""
    T = 150 if context.slow else 235
    given = inputs(context, Shape(T=T))
    prefill = hold.forward(context, given)
    cuts = {
        "chunks": [0, 1, 17, 64, 100, 101, T],
        "decode": [T - 40, *range(T - 39, T + 1)],
    }
    for label, ends in cuts.items():
        for start, stop in zip(ends[:-1], ends[1:], strict=True):
            with context.under(f"{label}: tokens {start} to {stop - 1}"):
                got = hold.forward(context, _chunk(given, start, stop))
                context.same("choice of blocks", got.indices, prefill.indices[:, start:stop])


def _chunk(given: Inputs, start: int, stop: int) -> Inputs:
    blocks = given.cfg.num_compressed(stop)
    return replace(
        given,
        q=given.q[:, start:stop],
        gates=given.gates[:, start:stop],
        k_cmp=given.k_cmp[:, :blocks],
        v_cmp=given.v_cmp[:, :blocks],
        **{name: getattr(given, name)[:, :stop] for name in NAMES[3:7]},
    )


def _stale_memory(context: Context) -> None:
    """Outputs must not depend on what their memory held: NaN, a number, or fresh pages."""
    shapes = {
        "dense": Shape(T=70, B=2),
        "rows that see nothing": Shape(T=COMPACT.block_size + 2),
        "packed with empty sequences": Shape(lengths=((5, 5), (0, 0), (16, 16), (40, 60))),
    }
    fillings: dict[str, Callable[[], AbstractContextManager[None]]] = {
        "unwritten memory is NaN": uninitialised_memory_is_nan,
        "freed memory held NaN": lambda: allocator_holds(context.device, torch.nan),
        "freed memory held 1e4": lambda: allocator_holds(context.device, 1e4),
    }
    for label, shape in shapes.items():
        given = inputs(context, shape)
        for filling, poisoned in fillings.items():
            with context.under(f"{label}, {filling}"), poisoned():
                hold.forward(context, given)
                hold.backward(context, given)


def _inputs_stay(context: Context) -> None:
    given = inputs(context, Shape(T=100))
    copies = [tensor.clone() for tensor in given.tensors]
    _gradients(context, given)
    for name, tensor, copy in zip(NAMES, given.tensors, copies, strict=True):
        context.same(f"{name} after the call", tensor, copy)


def _graph(context: Context) -> None:
    """Capture a step of decoding, then replay it on other data."""
    if context.device.type != "cuda":
        raise Unsupported(
            Reason(
                "no_graphs",
                f"torch captures no graphs on {context.device.type}",
                value=context.device.type,
                bound="a device of torch.cuda.CUDAGraph",
                remedy="run the suite on such a device",
            )
        )
    static = inputs(context, Shape(T=1, S=235, B=2))
    other = inputs(context, Shape(T=1, S=235, B=2), seed=1)
    with _side_stream():
        run(static, context.name)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(static, context.name)
    for tensor, values in zip(static.tensors, other.tensors, strict=True):
        tensor.copy_(values)
    graph.replay()
    torch.cuda.synchronize()
    expected = run(other, context.name)
    context.same("out of the replay", captured.out, expected.out)
    context.same("blocks chosen in the replay", captured.indices, expected.indices)


@contextmanager
def _side_stream() -> Iterator[None]:
    """Capture asks for a warm-up on another stream."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        yield
    torch.cuda.current_stream().wait_stream(stream)


def _case(
    name: str, title: str, check: Callable[[Context], None], shows: str, peers: str = ""
) -> Case:
    return Case(name, 4, title, shows, check, peers=peers)


CASES = (
    _case(
        "forward-repeats",
        "Forward again is bit-equal",
        _forward_repeats,
        "results change between runs: a race, or atomics in floating point",
    ),
    _case(
        "backward-repeats",
        "Backward again is bit-equal",
        _backward_repeats,
        "training cannot be reproduced",
        "backward twice is bit-equal",
    ),
    _case(
        "causal",
        "No later input changes an earlier row, to the bit",
        _causal,
        "training leaks the future",
    ),
    _case(
        "gradients-are-causal",
        "No row has a gradient in a later input",
        _gradients_are_causal,
        "backward leaks the future",
    ),
    _case(
        "other-batch-entries",
        "Other batch entries change nothing, not even with NaN",
        _other_entries,
        "one user's data reaches another's result",
    ),
    _case(
        "other-sequences",
        "Other packed sequences change nothing, not even with NaN",
        _other_sequences,
        "one document's data reaches another's result",
    ),
    _case(
        "batch-invariance",
        "An entry alone = the same entry in a batch",
        _batch_invariance,
        "answers depend on who else is served",
    ),
    _case(
        "prefill-chunked-decode",
        "Prefill = chunked prefill = decode",
        _chunks,
        "a model answers differently than it was trained",
    ),
    _case(
        "stale-memory",
        "Nothing depends on what unwritten memory holds",
        _stale_memory,
        "a row that is never written returns another call's data",
    ),
    _case(
        "inputs-stay-as-they-are",
        "Inputs are not written to",
        _inputs_stay,
        "a call corrupts the caller's tensors",
    ),
    _case(
        "graph-capture",
        "A captured graph replays on new data",
        _graph,
        "decoding cannot be captured, or replays old values",
    ),
)
