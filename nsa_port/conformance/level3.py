"""Level 3: packed sequences, queries anywhere among the keys, strides, lengths, geometry."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from nsa_port.conformance import hold
from nsa_port.conformance.case import Case, Context
from nsa_port.conformance.inputs import COMPACT, NAMES, Inputs, Shape, run
from nsa_port.conformance.level1 import inputs
from nsa_port.kernels.geometry import NSAConfig

Check = Callable[[Context], None]

PACKED = ((70, 70), (0, 0), (1, 1), (15, 15), (16, 16), (33, 33), (0, 0), (100, 100))
PACKED_LONGER_KEYS = ((20, 70), (0, 40), (1, 90), (15, 15), (0, 0), (3, 16), (50, 130))
LENGTHS = range(1, 131)
LENGTHS_WHERE_SLOW = (1, 2, 15, 16, 17, 31, 33, 47, 48, 63, 65, 97, 127, 130)

GEOMETRIES = {
    "l = d": NSAConfig(16, 16, 32, 4, window_size=40),
    "l = m": NSAConfig(32, 8, 32, 4, window_size=40),
    "l = d = m": NSAConfig(16, 16, 16, 6, window_size=16),
    "nothing forced": NSAConfig(16, 8, 32, 2, init_blocks=0, local_blocks=0, window_size=32),
    "everything forced": NSAConfig(16, 8, 32, 3, init_blocks=1, local_blocks=2, window_size=32),
    "one block": NSAConfig(16, 8, 32, 1, init_blocks=0, local_blocks=1, window_size=1),
    "two first blocks": NSAConfig(16, 8, 32, 5, init_blocks=2, local_blocks=1, window_size=64),
    "more blocks than there are": NSAConfig(16, 8, 32, 24, window_size=900),
    "blocks of three strides": NSAConfig(24, 8, 48, 4, window_size=50),
    "literal score map": NSAConfig(16, 8, 32, 5, window_size=48, score_map="literal"),
}


def both_ways(shape: Shape, change: Callable[[Inputs], Inputs] = lambda given: given) -> Check:
    """Forward and backward of one call."""

    def check(context: Context) -> None:
        hold.both_ways(context, change(inputs(context, shape)))

    return check


def _packed_spare_rows(context: Context) -> None:
    """Rows of k_cmp past the last sequence's blocks belong to no one, whatever they hold."""
    given = inputs(context, Shape(lengths=PACKED))
    expected = run(given, context.name)

    def lengthen(blocks: Tensor) -> Tensor:
        spare = torch.full_like(blocks[:, :7], 1000.0)
        return torch.cat((blocks, spare), dim=1)

    longer = replace(given, k_cmp=lengthen(given.k_cmp), v_cmp=lengthen(given.v_cmp)).leaves()
    got = run(longer, context.name, needs_grad=True)
    context.same("out", got.out.detach(), expected.out)
    context.same("indices", got.indices, expected.indices)
    for grad in torch.autograd.grad(got.out.sum(), (longer.k_cmp, longer.v_cmp)):
        context.require(not grad[:, -7:].any(), "a block of no sequence has a gradient")


def _positions(context: Context) -> None:
    given = inputs(context, Shape(T=70, S=235, B=2))
    generator = torch.Generator().manual_seed(3)
    shuffled = torch.randperm(235, generator=generator)[:70].to(torch.int32)
    several = torch.stack((shuffled, shuffled.flip(0)))
    several[:, ::9] = -1
    for label, positions in (("[T]", shuffled), ("[B, T] with padding", several)):
        with context.under(label):
            moved = replace(given, positions=positions.to(context.device))
            got = hold.both_ways(context, moved)
    padded = several.to(context.device) < 0
    context.require(not got.out[padded].any(), "a padded row's output is not 0")
    context.require(bool((got.lse[:, padded] == -torch.inf).all()), "a padded row's lse")
    context.require(bool((got.indices[padded] == -1).all()), "a padded row has chosen blocks")


def _packed_positions(context: Context) -> None:
    given = inputs(context, Shape(lengths=PACKED_LONGER_KEYS))
    generator = torch.Generator().manual_seed(4)
    parts = [
        torch.randint(-1, keys, (queries,), generator=generator, dtype=torch.int32)
        for queries, keys in PACKED_LONGER_KEYS
        if queries
    ]
    moved = replace(given, positions=torch.cat(parts).to(context.device))
    hold.both_ways(context, moved)


def _strides(context: Context) -> None:
    given = inputs(context, Shape(T=150, B=2))
    plain = run(given, context.name)

    def heads_first(tensor: Tensor) -> Tensor:
        return tensor.transpose(1, 2).contiguous().transpose(1, 2)

    def every_other(tensor: Tensor) -> Tensor:
        wide = tensor.new_full((*tensor.shape[:2], tensor.shape[2] * 2, tensor.shape[3]), 1000.0)
        wide[:, :, ::2] = tensor
        return wide[:, :, ::2]

    def padded_rows(tensor: Tensor) -> Tensor:
        wide = tensor.new_full((*tensor.shape[:3], tensor.shape[3] + 5), 1000.0)
        wide[..., 3:-2] = tensor
        return wide[..., 3:-2]

    for change in (heads_first, every_other, padded_rows):
        moved = replace(given.map(change), gates=given.gates)
        with context.under(change.__name__.replace("_", " ")):
            hold.both_ways(context, moved)
    with context.under("expanded over the batch"):
        shared = given.map(lambda tensor: tensor[:1].expand(2, *tensor.shape[1:]))
        got = hold.forward(context, shared)
        context.same("the two entries", got.out[0], got.out[1])
    again = run(given, context.name)
    context.same("the inputs are unchanged, so the result", again.out, plain.out)


def _upstream_strides(context: Context) -> None:
    """Gradients come in with any strides: expanded, transposed, or of a slice."""
    given = inputs(context, Shape(T=100)).leaves()
    out = hold.function(context, given)
    dense = torch.autograd.grad(out, given.tensors, torch.ones_like(out), retain_graph=True)
    expanded = torch.autograd.grad(out.sum(), given.tensors, retain_graph=True)
    ones = torch.ones_like(out.transpose(1, 2)).transpose(1, 2)
    transposed = torch.autograd.grad(out, given.tensors, ones)
    for name, a, b, c in zip(NAMES, dense, expanded, transposed, strict=True):
        context.same(f"d{name} from an expanded gradient", b, a)
        context.same(f"d{name} from a transposed gradient", c, a)


def _odd_lengths(context: Context) -> None:
    lengths = LENGTHS_WHERE_SLOW if context.slow else LENGTHS
    context.note(f"lengths {', '.join(map(str, lengths))}" if context.slow else "lengths 1 to 130")
    cfg = replace(COMPACT, num_selected=3, init_blocks=1, local_blocks=1, window_size=37)
    for T in lengths:
        with context.under(f"T={T}"):
            given = inputs(context, Shape(T=T, H=2, HK=1, Dk=16, Dv=16, cfg=cfg), seed=T)
            if T in LENGTHS_WHERE_SLOW:
                hold.both_ways(context, given)
            else:
                hold.forward(context, given)


def _head_dimensions(context: Context) -> None:
    dims = ((16, 48), (40, 24), (8, 128), (64, 32))
    for Dk, Dv in dims[:3] if context.slow else dims:  # each compiles every kernel anew
        with context.under(f"Dk={Dk}, Dv={Dv}"):
            both_ways(Shape(T=100, Dk=Dk, Dv=Dv))(context)


def _geometries(context: Context) -> None:
    for label, cfg in GEOMETRIES.items():
        with context.under(label):
            both_ways(Shape(T=170, cfg=cfg))(context)


def _case(name: str, title: str, check: Check, shows: str) -> Case:
    return Case(name, 3, title, shows, check)


CASES = (
    _case(
        "packed",
        "Packed sequences, some empty or shorter than a block",
        both_ways(Shape(lengths=PACKED)),
        "a token sees another sequence, or a block grid does not restart",
    ),
    _case(
        "packed-longer-keys",
        "Packed sequences with more keys than queries",
        both_ways(Shape(lengths=PACKED_LONGER_KEYS)),
        "chunked prefill of a packed batch goes wrong",
    ),
    _case(
        "packed-spare-rows",
        "Compressed rows past the last packed block belong to no one",
        _packed_spare_rows,
        "an upper bound for the number of blocks, which avoids a synchronisation, changes results",
    ),
    _case(
        "positions",
        "Queries at any positions, in any order, some padded",
        _positions,
        "sharded or padded queries see the wrong keys",
    ),
    _case(
        "packed-positions",
        "Positions inside packed sequences",
        _packed_positions,
        "positions are taken as global, not per sequence",
    ),
    _case(
        "strides",
        "Non-contiguous inputs: heads first, sliced heads, padded rows, expanded batch",
        _strides,
        "memory between the elements is read as data",
    ),
    _case(
        "gradient-strides",
        "Upstream gradients with any strides",
        _upstream_strides,
        "the loss's form changes the gradients",
    ),
    _case(
        "odd-lengths",
        "Every length from 1 to 130",
        _odd_lengths,
        "a tile's or block's edge is handled wrong",
    ),
    _case(
        "head-dimensions",
        "Dk and Dv that differ and are no powers of two",
        _head_dimensions,
        "padding of the head dimension reaches the result",
    ),
    _case(
        "geometries",
        "Every kind of block geometry, both score maps",
        _geometries,
        "some config is computed as if it were another",
    ),
)
