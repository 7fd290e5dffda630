"""Bad input raises a clear error before anything is computed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import nsa_port
from nsa_port import NSAConfig, registry

CFG = NSAConfig(8, 4, 16, 4, 1, 1, 24)
B, T, H, HK, DK, DV = 2, 40, 4, 2, 8, 6
C = CFG.num_compressed(T)


def good() -> dict[str, Any]:
    """A legal call of nsa_attention."""
    return {
        "q": torch.randn(B, T, H, DK),
        "k_cmp": torch.randn(B, C, HK, DK),
        "v_cmp": torch.randn(B, C, HK, DV),
        "k_slc": torch.randn(B, T, HK, DK),
        "v_slc": torch.randn(B, T, HK, DV),
        "k_win": torch.randn(B, T, HK, DK),
        "v_win": torch.randn(B, T, HK, DV),
        "gates": torch.rand(B, T, H, 3),
        "cfg": CFG,
    }


def packed(*cu: int, dtype: torch.dtype = torch.int32) -> dict[str, Any]:
    """The good call as one packed batch."""
    call = {
        name: value[:1] if isinstance(value, Tensor) else value for name, value in good().items()
    }
    return {**call, "cu_seqlens": torch.tensor(cu, dtype=dtype)}


@pytest.fixture(autouse=True)
def _no_kernel_may_start(monkeypatch: pytest.MonkeyPatch) -> None:
    def started(*_: object) -> Callable:
        raise AssertionError("a kernel started")

    monkeypatch.setattr(registry, "kernel", started)
    monkeypatch.setattr("nsa_port.compose.kernel", started)


def last_dimension_strided(shape: tuple[int, ...]) -> Tensor:
    return torch.randn(*shape[:-1], shape[-1] * 2)[..., ::2]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"q": torch.randn(T, H, DK)}, ValueError, "4 dimensions"),
        ({"k_slc": torch.randn(B, T, DK)}, ValueError, "k_slc must have 4"),
        ({"q": torch.ones(B, T, H, DK, dtype=torch.int64)}, TypeError, "q must be float16"),
        ({"v_win": torch.randn(B, T, HK, DV).half()}, TypeError, "v_win must have the dtype"),
        ({"k_win": torch.randn(B, T, HK, DK, device="meta")}, ValueError, "k_win must be on"),
        ({"gates": torch.rand(B, T, H, 3, device="meta")}, ValueError, "gates must be on"),
        ({"q": last_dimension_strided((B, T, H, DK))}, ValueError, "contiguous"),
        ({"v_slc": last_dimension_strided((B, T, HK, DV))}, ValueError, "contiguous"),
        ({"q": torch.randn(B, T, 3, DK)}, ValueError, "multiple"),
        ({"q": torch.randn(B, T, H, DK + 1)}, ValueError, "head dimension of k_cmp"),
        ({"k_slc": torch.randn(B + 1, T, HK, DK)}, ValueError, "batch of k_slc"),
        ({"v_slc": torch.randn(B, T - 1, HK, DV)}, ValueError, "k_slc and v_slc"),
        ({"k_win": torch.randn(B, T, 1, DK)}, ValueError, "k_win and v_win"),
        ({"v_win": torch.randn(B, T, HK, DV + 1)}, ValueError, "v_win must equal"),
        (
            {"k_win": torch.randn(B, T + 1, HK, DK), "v_win": torch.randn(B, T + 1, HK, DV)},
            ValueError,
            "as long",
        ),
        ({"k_cmp": torch.randn(B, C + 1, HK, DK)}, ValueError, "k_cmp and v_cmp"),
        (
            {"k_cmp": torch.randn(B, C + 1, HK, DK), "v_cmp": torch.randn(B, C + 1, HK, DV)},
            ValueError,
            f"hold {C} blocks",
        ),
        ({"q": torch.randn(B, T + 1, H, DK)}, ValueError, "more queries than keys"),
        ({"gates": torch.rand(B, T, H, 2)}, ValueError, "broadcast"),
        ({"gates": torch.rand(B, T + 1, H, 3)}, ValueError, "broadcast"),
        ({"gates": torch.rand(1, B, T, H, 3)}, ValueError, "broadcast"),
        ({"gates": torch.ones(3, dtype=torch.int32)}, TypeError, "floating"),
        ({"scale": float("nan")}, ValueError, "scale"),
        ({"positions": torch.arange(T)}, TypeError, "positions must be int32"),
        ({"positions": torch.arange(T - 1, dtype=torch.int32)}, ValueError, "positions must be"),
        ({"positions": torch.arange(1, T + 1, dtype=torch.int32)}, ValueError, "must lie in -1"),
        ({"positions": torch.full((T,), -2, dtype=torch.int32)}, ValueError, "must lie in -1"),
        ({"cu_seqlens": torch.tensor([0, T], dtype=torch.int32)}, ValueError, "batch 1"),
        ({"cu_seqlens_k": torch.tensor([0, T], dtype=torch.int32)}, ValueError, "needs cu_seq"),
    ],
)
def test_dense_call(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        nsa_port.nsa_attention(**{**good(), **change})


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (packed(1, T), ValueError, "start at 0"),
        (packed(0, 30, 20, T), ValueError, "not decrease"),
        (packed(0, 20, T + 1), ValueError, f"end at the number of queries, {T}"),
        (packed(0, 20, T - 1), ValueError, f"end at the number of queries, {T}"),
        (packed(0, T, dtype=torch.int64), TypeError, "cu_seqlens must be int32"),
        (
            packed(0, T) | {"cu_seqlens_k": torch.tensor([0, 9, T], dtype=torch.int32)},
            ValueError,
            "same length",
        ),
        (
            packed(0, 20, T) | {"cu_seqlens_k": torch.tensor([0, 10, T], dtype=torch.int32)},
            ValueError,
            "sequence 0 has more queries",
        ),
        (
            packed(0, 20, T) | {"positions": torch.arange(T, dtype=torch.int32)},
            ValueError,
            "got 20 at query 20",
        ),
    ],
)
def test_packed_call(call: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        nsa_port.nsa_attention(**call)


def test_packed_call_with_too_few_compressed_blocks() -> None:
    call = packed(0, T)
    call["k_cmp"], call["v_cmp"] = call["k_cmp"][:, :-1], call["v_cmp"][:, :-1]
    with pytest.raises(ValueError, match="of all packed sequences"):
        nsa_port.nsa_attention(**call)


@pytest.mark.parametrize(
    ("idx", "error", "message"),
    [
        (torch.zeros(B, T, HK, 4), TypeError, "int32"),
        (torch.zeros(B, T, HK, 4, dtype=torch.int64), TypeError, "int32"),
        (torch.zeros(B, T, HK, 3, dtype=torch.int32), ValueError, "must be \\[B, T, HK, n\\]"),
        (torch.full((B, T, HK, 4), 3, dtype=torch.int32), ValueError, "got 3"),
        (torch.full((B, T, HK, 4), -2, dtype=torch.int32), ValueError, "got -2"),
        (torch.zeros(B, T, HK, 4, dtype=torch.int32), ValueError, "twice"),
    ],
)
def test_block_indices(idx: Tensor, error: type[Exception], message: str) -> None:
    call = good()
    with pytest.raises(error, match=message):
        nsa_port.selected_attention(call["q"], call["k_slc"], call["v_slc"], idx, CFG)


@pytest.mark.parametrize(
    ("lse", "error"),
    [
        (torch.zeros(B, T, HK), ValueError),
        (torch.zeros(B, T, H, dtype=torch.float64), TypeError),
    ],
)
def test_log_sum_exp(lse: Tensor, error: type[Exception]) -> None:
    call = good()
    with pytest.raises(error, match="lse must be"):
        nsa_port.select_blocks(call["q"], call["k_cmp"], lse, CFG)


def test_compressed_keys_that_do_not_belong_to_num_keys() -> None:
    call = good()
    with pytest.raises(ValueError, match="pass num_keys"):
        nsa_port.compressed_attention(call["q"][:, :4], call["k_cmp"], call["v_cmp"], CFG)


def test_branches_that_differ() -> None:
    o = torch.randn(B, T, H, DV)
    with pytest.raises(ValueError, match="o_win must have the shape"):
        nsa_port.combine(o, o, o[:, :-1], torch.rand(3))


def test_errors_are_the_same_under_compile() -> None:
    call = good() | {"gates": torch.rand(B, T, H, 2)}
    compiled = torch.compile(nsa_port.nsa_attention, fullgraph=True, backend="eager")
    with pytest.raises(ValueError, match="broadcast"):
        compiled(**call)
