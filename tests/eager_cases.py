"""Calls of the operators for the tests of the PyTorch kernels: inputs, and what is expected."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from nsa_port import reference
from nsa_port.kernels.geometry import Layout, NSAConfig

SMALL = NSAConfig(8, 4, 16, 5, 1, 2, 24)


@dataclass(frozen=True)
class Case:
    """One problem; `lengths` are (queries, keys) of packed sequences."""

    name: str
    config: NSAConfig = SMALL
    B: int = 1
    T: int = 75
    S: int = 75
    H: int = 4
    HK: int = 2
    Dk: int = 8
    Dv: int = 12
    lengths: tuple[tuple[int, int], ...] = ()
    positions: Tensor | None = None
    spare_blocks: int = 0
    dtype: torch.dtype = torch.float32
    spread: float = 1.0

    def __str__(self) -> str:
        return self.name

    @property
    def packed(self) -> bool:
        return bool(self.lengths)

    @property
    def layout(self) -> Layout:
        if not self.packed:
            return Layout(self.S, positions=self.positions)
        cu_q, cu_k = self.cu_seqlens
        return Layout(int(cu_k[-1]), cu_q, cu_k, self.positions)

    @property
    def cu_seqlens(self) -> tuple[Tensor, Tensor]:
        return cumulative([t for t, _ in self.lengths]), cumulative([s for _, s in self.lengths])

    @property
    def where(self) -> dict[str, Tensor | None]:
        """The keyword arguments by which the reference takes the layout."""
        cu_q, cu_k = self.cu_seqlens if self.packed else (None, None)
        return {"cu_seqlens": cu_q, "cu_seqlens_k": cu_k, "positions": self.positions}

    @property
    def scale(self) -> float:
        return float(self.Dk**-0.5)


@dataclass
class Inputs:
    """Random tensors of a case, in the call's dtype."""

    q: Tensor
    k_cmp: Tensor
    v_cmp: Tensor
    k_slc: Tensor
    v_slc: Tensor
    k_win: Tensor
    v_win: Tensor
    gates: Tensor
    grad: Tensor
    grad_lse: Tensor
    names: tuple[str, ...] = field(
        default=("q", "k_cmp", "v_cmp", "k_slc", "v_slc", "k_win", "v_win", "gates")
    )

    def tensors(self) -> list[Tensor]:
        return [getattr(self, name) for name in self.names]


def cumulative(lengths: Sequence[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def make_inputs(case: Case, seed: int = 0) -> Inputs:
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(case.dtype)

    if case.packed:
        T, S = (sum(column) for column in zip(*case.lengths, strict=True))
        C = sum(case.config.num_compressed(s) for _, s in case.lengths)
    else:
        T, S = case.T, case.S
        C = case.config.num_compressed(S) + case.spare_blocks
    B, H, HK, Dk, Dv = case.B, case.H, case.HK, case.Dk, case.Dv
    return Inputs(
        q=random(B, T, H, Dk) * case.spread,
        k_cmp=random(B, C, HK, Dk),
        v_cmp=random(B, C, HK, Dv),
        k_slc=random(B, S, HK, Dk),
        v_slc=random(B, S, HK, Dv),
        k_win=random(B, S, HK, Dk),
        v_win=random(B, S, HK, Dv),
        gates=torch.rand(B, T, H, 3, generator=generator).to(case.dtype),
        grad=random(B, T, H, Dv),
        grad_lse=torch.randn(B, T, H, generator=generator).to(
            torch.promote_types(case.dtype, torch.float32)
        ),
    )


def _cases() -> list[Case]:
    shuffled = torch.randperm(75, generator=torch.Generator().manual_seed(3)).to(torch.int32)
    holes = shuffled.clone()
    holes[::5] = -1
    rows = torch.stack([shuffled, holes])
    repeated = torch.full((75,), 70, dtype=torch.int32)
    ragged = ((20, 20), (0, 0), (5, 5), (33, 33), (1, 1), (40, 40))
    local = torch.cat([torch.randperm(s)[:t] for t, s in ragged]).to(torch.int32)
    return [
        Case("plain"),
        Case("batch", B=2, HK=1),
        Case("one_head_per_group", H=3, HK=3),
        Case("longer_cache", T=30, S=101),
        Case("one_query", T=1, S=90, B=2),
        Case("no_query", T=0, S=40),
        Case("shorter_than_a_block", T=6, S=6),
        Case("one_token", T=1, S=1),
        Case("spare_blocks", spare_blocks=4, T=40, S=60),
        Case("literal", config=replace(SMALL, score_map="literal")),
        Case("equal_blocks", config=NSAConfig(16, 16, 16, 4, 1, 1, 16)),
        Case("block_of_one", config=NSAConfig(1, 1, 1, 3, 0, 1, 1), T=40, S=40),
        Case("wide_overlap", config=NSAConfig(16, 2, 16, 4, 0, 0, 70)),
        Case("nothing_forced", config=NSAConfig(8, 4, 16, 2, 0, 0, 200)),
        Case("all_forced", config=NSAConfig(8, 4, 8, 3, 1, 2, 5)),
        Case("more_blocks_than_exist", config=NSAConfig(8, 4, 16, 20, 1, 2, 24)),
        Case("shuffled", positions=shuffled),
        Case("holes_per_batch_entry", positions=rows, B=2),
        Case("one_position_for_all", positions=repeated),
        Case("packed", lengths=ragged),
        Case("packed_cache", lengths=((3, 20), (0, 7), (1, 60), (17, 17), (0, 0))),
        Case("packed_shuffled", lengths=ragged, positions=local),
        Case("packed_only_empty", lengths=((0, 0), (0, 0))),
        Case("far_apart_logits", spread=200.0),
        Case("float64", dtype=torch.float64),
        Case("bfloat16", dtype=torch.bfloat16),
        Case("float16", dtype=torch.float16),
        Case("bfloat16_packed", dtype=torch.bfloat16, lengths=ragged),
    ]


CASES = _cases()


def assert_close(
    actual: Tensor,
    exact: Tensor,
    plain: Tensor,
    what: str,
    source: Tensor | None = None,
    lse: Tensor | None = None,
) -> None:
    """`actual` errs at most twice as much as a plain run in the same dtype, and a rounding band.

    Args:
        exact: the reference in float64.
        plain: the reference in the dtype of the call.
        source: what a gradient comes from. The softmax's backward subtracts two numbers of its
            size, so that a gradient near 0 still carries their rounding.
        lse: what a gradient's probabilities are made from: `exp(s - lse)` is off by the rounding
            of `lse`, which the reference never rounds.
    """
    assert actual.shape == exact.shape, (what, actual.shape, exact.shape)
    if actual.numel() == 0:
        return
    same = actual.double() == exact
    error = (actual.double() - exact).abs().masked_fill(same, 0)
    allowed = (plain.double() - exact).abs().masked_fill(plain.double() == exact, 0).max()
    finite = exact.masked_fill(~exact.isfinite(), 0)
    size = finite.abs().max()
    if source is not None and source.numel():
        size = torch.maximum(size, source.abs().max().double())
    rounding = 4 * torch.finfo(actual.dtype).eps
    if lse is not None and lse.numel():
        rounding += torch.finfo(lse.dtype).eps * lse.nan_to_num(0, 0, 0).abs().max().item()
    band = rounding * size
    bound = 2 * allowed + band
    assert not actual.isnan().any(), f"{what}: NaN"
    assert error.max() <= bound, f"{what}: error {error.max():.3g} over {bound:.3g}"


def reference_run(
    operator: str, case: Case, tensors: list[Tensor], grads: tuple[Tensor, ...], wide: bool
) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs and input gradients of the reference, in float64 if `wide`."""
    if wide:
        tensors = [t.double() if t.is_floating_point() else t for t in tensors]
    leaves = [t.detach().clone().requires_grad_() if t.is_floating_point() else t for t in tensors]
    options: dict = dict(case.where)
    if operator == "compressed_attention":
        options["num_keys"] = case.S
    outputs = getattr(reference, operator)(*leaves, case.config, scale=case.scale, **options)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    wanted = [leaf for leaf in leaves if leaf.is_floating_point()]
    used = [(o, g.to(o.dtype)) for o, g in zip(outputs, grads, strict=True) if o.requires_grad]
    found = torch.autograd.grad(
        [o for o, _ in used],
        wanted,
        [g for _, g in used],
        allow_unused=True,
        materialize_grads=True,
    )
    return [o.detach() for o in outputs], list(found)


@contextmanager
def no_waiting() -> Iterator[None]:
    """Whatever makes the host wait for the device raises."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
