"""Backends that are wrong on purpose, each in one way: what the suite must catch to be believed.

Each is the backend `torch` with some kernels replaced. `FLAWS` names them, and for each the cases
that must fail; `plugged_in(name)` makes one known while a block runs.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from nsa_port import reference
from nsa_port.backends.interface import PARTS, Backend, Environment, Problem, Reason
from nsa_port.kernels import eager
from nsa_port.kernels.geometry import Layout, NSAConfig
from nsa_port.registry import plug_in

Kernel = Callable[..., object]


@dataclass(frozen=True, slots=True)
class Flaw:
    """One way to be wrong.

    Args:
        title: what is wrong, in a few words.
        kernels: the replaced functions of the backend's kernel module.
        caught_by: ids of cases that must fail.
    """

    title: str
    kernels: Mapping[str, Kernel]
    caught_by: tuple[str, ...]


class BrokenOnPurpose:
    """The backend `torch` with a flaw; never chosen automatically."""

    level = 4
    kernels: Mapping[str, str]

    def __init__(self, name: str) -> None:
        self.name = name
        self.kernels = dict.fromkeys(("mean_compress", *PARTS), f"{__name__}.{name}")

    def is_native(self, environment: Environment) -> bool:
        return False

    def machine_reasons(self, environment: Environment) -> tuple[Reason, ...]:
        return ()

    def call_reasons(self, environment: Environment, problem: Problem) -> tuple[Reason, ...]:
        if problem.dtype.is_floating_point:
            return ()
        return (
            Reason(
                "dtype_unsupported",
                f"{self.name} does not compute in {problem.dtype}",
                value=str(problem.dtype),
                bound="floating point",
                remedy="convert the tensors",
            ),
        )


@contextmanager
def plugged_in(name: str) -> Iterator[Backend]:
    """The broken backend called `name`, known to the registry inside the block."""
    backend = BrokenOnPurpose(name)
    module = ModuleType(f"{__name__}.{name}")
    for operator in eager.__all__:
        setattr(module, operator, getattr(eager, operator))
    for operator, kernel in FLAWS[name].kernels.items():
        setattr(module, operator, kernel)
    sys.modules[module.__name__] = module
    try:
        with plug_in(backend):
            yield backend
    finally:
        del sys.modules[module.__name__]


def _sees_its_whole_block(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    config: NSAConfig,
    layout: Layout,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Each query stands at the end of its own selection block, so that it sees all of it."""
    size = config.select_block_size
    positions = layout.query_positions(q.shape[1], q.device)
    last = positions.div(size, rounding_mode="floor") * size + size - 1
    last = torch.where(positions < 0, positions, last.clamp(max=layout.num_keys - 1))
    moved = replace(layout, positions=last.expand(q.shape[:2]).to(torch.int32).contiguous())
    return eager.selected_attention(q, k, v, indices, config, moved, scale)


def _one_key_more(
    q: Tensor, k: Tensor, v: Tensor, config: NSAConfig, layout: Layout, scale: float
) -> tuple[Tensor, Tensor]:
    wider = replace(config, window_size=config.window_size + 1)
    return eager.window_attention(q, k, v, wider, layout, scale)


def _first_head_decides(
    q: Tensor, k_cmp: Tensor, lse: Tensor, config: NSAConfig, layout: Layout, scale: float
) -> Tensor:
    group = q.shape[2] // k_cmp.shape[2]
    first = q[:, :, ::group], k_cmp, lse[:, :, ::group]
    return eager.select_blocks(*first, config, layout, scale)


def _leaves_empty_rows_unwritten(
    q: Tensor, k: Tensor, v: Tensor, config: NSAConfig, layout: Layout, scale: float
) -> tuple[Tensor, Tensor]:
    out, lse = eager.compressed_attention(q, k, v, config, layout, scale)
    sees_any = lse.isfinite()
    stale = torch.empty_like(out)
    stale[sees_any] = out[sees_any]
    return stale, lse


def _choose_by(
    scores_of: Callable[[Tensor], Tensor], *, ties_go_up: bool = False
) -> Callable[..., Tensor]:
    """`select_blocks` by changed scores; packed calls are left to `torch`."""

    def select_blocks(
        q: Tensor, k_cmp: Tensor, lse: Tensor, config: NSAConfig, layout: Layout, scale: float
    ) -> Tensor:
        if layout.packed:
            return eager.select_blocks(q, k_cmp, lse, config, layout, scale)
        scores = scores_of(
            reference.block_scores(
                q,
                k_cmp,
                lse,
                config,
                num_keys=layout.num_keys,
                scale=scale,
                positions=layout.positions,
            )
        )
        block = torch.arange(scores.shape[-1], device=q.device)
        own = layout.query_positions(q.shape[1], q.device)[:, :, None, None]
        own = own.div(config.select_block_size, rounding_mode="floor")
        forced = (block < config.init_blocks) | (block > own - config.local_blocks)
        ranked = scores.masked_fill(forced, torch.inf).masked_fill(block > own, -torch.inf)
        order = ranked.flip(-1) if ties_go_up else ranked
        best = order.sort(dim=-1, descending=True, stable=True).indices[..., : config.num_selected]
        best = len(block) - 1 - best if ties_go_up else best
        best = best.masked_fill(best > own, len(block)).sort(dim=-1).values
        best = best.masked_fill(best == len(block), -1)
        missing = config.num_selected - best.shape[-1]
        return torch.nn.functional.pad(best, (0, missing), value=-1).to(torch.int32)

    return select_blocks


def _zero_for_minus_infinity(
    q: Tensor, k: Tensor, v: Tensor, config: NSAConfig, layout: Layout, scale: float
) -> tuple[Tensor, Tensor]:
    out, lse = eager.compressed_attention(q, k, v, config, layout, scale)
    return out, lse.masked_fill(lse == -torch.inf, 0.0)


_runs = itertools.count()


def _changes_between_runs(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The last bit of one key's gradient depends on which run it is, as with atomics."""
    dq, dk, dv = eager.window_attention_backward(*args)
    if dk.numel() and next(_runs) % 2:
        dk.view(-1)[0] *= 1 + 2 * torch.finfo(dk.dtype).eps
    return dq, dk, dv


FLAWS: dict[str, Flaw] = {
    "no_mask_in_own_block": Flaw(
        "no causal mask in the own block",
        {"selected_attention": _sees_its_whole_block},
        ("selected-attention", "own-block-is-causal", "causal"),
    ),
    "window_off_by_one": Flaw(
        "the window has one key more",
        {"window_attention": _one_key_more},
        ("window-attention", "prefill-last-row-is-decode"),
    ),
    "scores_of_one_head": Flaw(
        "scores of one head only",
        {"select_blocks": _first_head_decides},
        ("select-blocks", "heads-prefer-different-blocks"),
    ),
    "stale_memory": Flaw(
        "rows that see nothing are never written",
        {"compressed_attention": _leaves_empty_rows_unwritten},
        ("compressed-attention", "stale-memory"),
    ),
    "ties_go_up": Flaw(
        "ties go to the higher block",
        {"select_blocks": _choose_by(lambda scores: scores, ties_go_up=True)},
        ("ties-go-to-the-lower-block", "eq9-weights"),
    ),
    "scores_in_bfloat16": Flaw(
        "scores in bfloat16",
        {"select_blocks": _choose_by(lambda scores: scores.bfloat16().float())},
        ("small-scores-rank-exactly",),
    ),
    "zero_for_minus_infinity": Flaw(
        "the lse of a row that sees nothing is 0",
        {"compressed_attention": _zero_for_minus_infinity},
        ("compressed-attention", "nsa-attention"),
    ),
    "changes_between_runs": Flaw(
        "a race that changes between runs",
        {"window_attention_backward": _changes_between_runs},
        ("backward-repeats",),
    ),
}
"""Every flaw, by the name of its backend."""
