"""Level 1: forward, each operator alone and all of them together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from nsa_port import functional, reference
from nsa_port.conformance import hold, tolerance
from nsa_port.conformance.case import OPTIONAL, REQUIRED, Case, Context
from nsa_port.conformance.inputs import COMPACT, Inputs, Shape, like, make
from nsa_port.kernels.geometry import NSAConfig

ALL_DTYPES = (*REQUIRED, *OPTIONAL)
PAPER_BLOCKS = NSAConfig(num_selected=6, window_size=96)


def inputs(context: Context, shape: Shape | None = None, *, seed: int = 0) -> Inputs:
    """The case's inputs, in its dtype on its device; smaller where kernels are interpreted."""
    shape = shape or Shape()
    if context.slow:
        shape = shape.smaller()
    return make(shape, context.dtype, context.device, seed=seed)


def branch(
    context: Context, given: Inputs, name: str, actual: tuple[Tensor, Tensor], indices: Tensor
) -> None:
    """Compare one branch's `out, lse` with the reference's."""
    both = hold.references(context, given)
    exact = _reference_branch(name, both.exact, indices)
    plain = _reference_branch(name, both.plain, indices)
    exponent = tolerance.largest_exponent(exact[1])
    for at, label in enumerate(("out", "lse")):
        context.compare(label, actual[at], exact[at], plain[at], exponent=exponent)


def _reference_branch(name: str, given: Inputs, indices: Tensor) -> tuple[Tensor, Tensor]:
    if name == "compressed":
        return reference.compressed_attention(
            given.q, given.k_cmp, given.v_cmp, given.cfg, num_keys=given.num_keys, **given.where
        )
    if name == "selected":
        indices = indices.to(given.q.device)
        return reference.selected_attention(
            given.q, given.k_slc, given.v_slc, indices, given.cfg, **given.where
        )
    return reference.window_attention(given.q, given.k_win, given.v_win, given.cfg, **given.where)


def random_indices(given: Inputs, *, seed: int = 5) -> Tensor:
    """Any legal choice: each row takes up to n random candidates, ascending."""
    generator = torch.Generator().manual_seed(seed)
    cfg, T, HK = given.cfg, given.q.shape[1], given.k_slc.shape[2]
    own = torch.arange(given.num_keys - T, given.num_keys) // cfg.select_block_size
    blocks = cfg.num_select_blocks(given.num_keys)
    keys = torch.rand(given.q.shape[0], T, HK, blocks, generator=generator)
    allowed = torch.arange(blocks) <= own[:, None, None]
    order = keys.masked_fill(~allowed, 2.0).argsort(-1)[..., : cfg.num_selected]
    order = order.masked_fill(~allowed.expand_as(keys).gather(-1, order), blocks)
    order = order.sort(-1).values
    order = order.masked_fill(order == blocks, -1)
    missing = cfg.num_selected - order.shape[-1]
    order = torch.nn.functional.pad(order, (0, missing), value=-1)
    return order.to(given.q.device, torch.int32)


def _mean_compress(context: Context) -> None:
    for T in (235, 15, 16, 240):
        k = inputs(context, Shape(T=T)).k_slc
        with context.under(f"S={T}"):
            actual = functional.mean_compress(k, COMPACT, backend=context.name)
            exact, plain = (
                reference.mean_compress(form(context, k), COMPACT)
                for form in (hold.to_exact, hold.to_plain)
            )
            context.compare("k_cmp", actual, exact, plain)
    more = functional.mean_compress(k, COMPACT, num_blocks=40, backend=context.name)
    context.require(not more[:, COMPACT.num_compressed(240) :].any(), "rows past the last block")


def _compressed(context: Context) -> None:
    given = inputs(context)
    actual = functional.compressed_attention(
        given.q, given.k_cmp, given.v_cmp, given.cfg, backend=context.name
    )
    branch(context, given, "compressed", actual, random_indices(given))
    first = COMPACT.block_size - 1
    context.require(not actual[0][:, :first].any(), "a row that sees no block is not 0")
    context.require(bool((actual[1][:, :first] == -torch.inf).all()), "its log-sum-exp is not -inf")


def _select(context: Context) -> None:
    given = inputs(context)
    _, lse = functional.compressed_attention(
        given.q, given.k_cmp, given.v_cmp, given.cfg, backend=context.name
    )
    indices = functional.select_blocks(given.q, given.k_cmp, lse, given.cfg, backend=context.name)
    hold.selection(context, given, indices)


def _selected(context: Context) -> None:
    given = inputs(context)
    indices = random_indices(given)
    actual = functional.selected_attention(
        given.q, given.k_slc, given.v_slc, indices, given.cfg, backend=context.name
    )
    branch(context, given, "selected", actual, indices)
    shuffled = functional.selected_attention(
        given.q, given.k_slc, given.v_slc, indices.flip(-1), given.cfg, backend=context.name
    )
    with context.under("blocks in descending order"):
        branch(context, given, "selected", shuffled, indices)


def _window(context: Context) -> None:
    given = inputs(context)
    for size in (48, 1, 7, 500):
        sized = replace(given, cfg=replace(COMPACT, window_size=size))
        actual = functional.window_attention(
            given.q, given.k_win, given.v_win, sized.cfg, backend=context.name
        )
        with context.under(f"w={size}"):
            branch(context, sized, "window", actual, random_indices(given))


def _combine(context: Context) -> None:
    values = inputs(context).v_slc.repeat(1, 1, 2, 1)
    o_cmp, o_slc, o_win = (like(values, seed) for seed in (1, 2, 3))
    T, H = o_cmp.shape[1:3]
    for shape in ((1, T, H, 3), (3,), (H, 3), (T, 1, 3), (1, 1, 1, 1)):
        gates = like(values.new_empty(shape), 4).sigmoid()
        actual = functional.combine(o_cmp, o_slc, o_win, gates, backend=context.name)
        exact, plain = (
            reference.combine(
                form(context, o_cmp),
                form(context, o_slc),
                form(context, o_win),
                form(context, gates),
            )
            for form in (hold.to_exact, hold.to_plain)
        )
        with context.under(f"gates {list(shape)}"):
            context.compare("out", actual, exact, plain)


def _whole(shape: Shape) -> Callable[[Context], None]:
    def check(context: Context) -> None:
        given = inputs(context, shape)
        got = hold.forward(context, given)
        context.require(got.out.is_contiguous(), "out is not contiguous")
        hold.selection(context, given, got.indices)
        out = hold.function(context, given)
        context.require(out.dtype == context.dtype, f"out is {out.dtype}")

    return check


def _sharing_tensors(context: Context) -> None:
    """One key/value set for all three branches is a special case, not another function."""
    given = inputs(context)
    k_cmp = functional.mean_compress(given.k_slc, COMPACT, backend=context.name)
    v_cmp = functional.mean_compress(given.v_slc, COMPACT, backend=context.name)
    hold.forward(
        context,
        replace(given, k_cmp=k_cmp, v_cmp=v_cmp, k_win=given.k_slc, v_win=given.v_slc),
    )


def _case(name: str, title: str, check: Callable[[Context], None], shows: str) -> Case:
    return Case(name, 1, title, shows, check, dtypes=ALL_DTYPES)


CASES = (
    _case("mean-compress", "Mean compression (Eq. 7)", _mean_compress, "blocks are averaged wrong"),
    _case(
        "compressed-attention",
        "Compressed attention and its log-sum-exp (Eq. 8)",
        _compressed,
        "a query sees an unfinished block, or misses a finished one",
    ),
    _case(
        "select-blocks",
        "Choice of blocks (Eq. 9, 10)",
        _select,
        "queries attend to other blocks than the paper's",
    ),
    _case(
        "selected-attention",
        "Selected attention over any choice (Eq. 11, 12)",
        _selected,
        "tokens of chosen blocks are missed, or others seen",
    ),
    _case(
        "window-attention",
        "Window of exactly w keys",
        _window,
        "the window is one key too long or too short",
    ),
    _case("combine", "Gated sum (Eq. 5), gates of any shape", _combine, "gates broadcast wrong"),
    _case(
        "nsa-attention",
        "The whole of NSA, batch of 2",
        _whole(Shape(B=2)),
        "the operators do not fit together",
    ),
    _case(
        "nsa-attention-paper-blocks",
        "The paper's block sizes: l=32, d=16, m=64",
        _whole(Shape(T=450, cfg=PAPER_BLOCKS)),
        "the paper's own setting is wrong",
    ),
    _case(
        "nsa-attention-one-key-value-set",
        "One key/value set for all three branches",
        _sharing_tensors,
        "inputs that share memory are mishandled",
    ),
)
