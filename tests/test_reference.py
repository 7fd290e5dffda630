"""The oracle itself: cases small enough to compute by hand, and stored answers."""

from __future__ import annotations

import json
import math

import pytest
import torch

from nsa_port import NSAConfig, reference
from tests import golden

TINY = NSAConfig(2, 1, 2, 3, 1, 1, 2)
"""l=2, d=1, m=2, n=3 with one initial and one local block, w=2."""


def column(*values: float) -> torch.Tensor:
    """`[1, len(values), 1, 1]` in float64."""
    return torch.tensor(values, dtype=torch.float64).view(1, -1, 1, 1)


def test_mean_compression_by_hand() -> None:
    x = column(1, 3, 5, 11)
    assert reference.mean_compress(x, TINY).flatten().tolist() == [2, 4, 8]
    assert reference.mean_compress(x, NSAConfig(2, 2, 2, 3)).flatten().tolist() == [2, 8]
    assert reference.mean_compress(x[:, :1], TINY).shape == (1, 0, 1, 1)


def test_compressed_attention_by_hand() -> None:
    q, k, v = column(1, 1, 1), column(0, math.log(3)), column(4, 8)
    out, lse = reference.compressed_attention(q, k, v, TINY, scale=1.0)
    assert out.flatten().tolist() == pytest.approx([0, 4, (4 + 3 * 8) / 4])
    assert lse.flatten().tolist() == pytest.approx([-math.inf, 0, math.log(4)])


@pytest.mark.parametrize(
    ("score_map", "block", "expected"),
    [
        ("overlap", 0, [2, 0, 0]),
        ("overlap", 2, [2, 0, 0]),
        ("overlap", 3, [1, 1, 0]),
        ("overlap", 4, [0, 2, 0]),
        ("overlap", 7, [0, 1, 1]),
        ("literal", 0, [1, 1, 0]),
        ("literal", 1, [0, 2, 0]),
        ("literal", 4, [0, 1, 1]),
        ("literal", 8, [0, 0, 1]),
    ],
)
def test_block_scores_when_one_compressed_block_has_all_the_weight(
    score_map: str, block: int, expected: list[float]
) -> None:
    cfg = NSAConfig(2, 1, 4, 4, 0, 0, 1, score_map)
    assert cfg.score_weights()[1] == (1, 2, 2, 2, 1)
    logits = torch.full((1, 11, 1, 1), -1e4, dtype=torch.float64)
    logits[0, block] = 0
    lse = torch.zeros(1, 1, 1, dtype=torch.float64)
    scores = reference.block_scores(column(1), logits, lse, cfg, num_keys=12, scale=1.0)
    assert scores.flatten().tolist() == expected


def test_selection_by_hand() -> None:
    cfg = NSAConfig(1, 1, 1, 3, 1, 1, 1)
    logits = column(0, 1, 5, 3, 2, 0)
    q = torch.ones(1, 6, 1, 1, dtype=torch.float64)
    lse = torch.zeros(1, 6, 1, dtype=torch.float64)
    idx = reference.select_blocks(q, logits, lse, cfg, scale=1.0)
    assert idx[0, :, 0].tolist() == [
        [0, -1, -1],
        [0, 1, -1],
        [0, 1, 2],
        [0, 2, 3],
        [0, 2, 4],
        [0, 2, 5],
    ]


def test_ties_go_to_the_lower_block() -> None:
    cfg = NSAConfig(1, 1, 1, 3, 0, 1, 1)
    q = torch.ones(1, 6, 1, 1, dtype=torch.float64)
    idx = reference.select_blocks(q, torch.zeros_like(q), q[..., 0] * 0, cfg)
    assert idx[0, 5, 0].tolist() == [0, 1, 5]


def test_selected_attention_by_hand() -> None:
    q, k, v = column(1, 1, 1, 1), column(0, 0, 0, math.log(2)), column(1, 2, 3, 6)
    idx = torch.tensor([[-1, -1, -1], [0, -1, -1], [1, -1, -1], [0, 1, -1]], dtype=torch.int32)
    out, lse = reference.selected_attention(q, k, v, idx.view(1, 4, 1, 3), TINY, scale=1.0)
    assert out.flatten().tolist() == pytest.approx([0, 1.5, 3, (1 + 2 + 3 + 12) / 5])
    assert lse.flatten().tolist() == pytest.approx([-math.inf, math.log(2), 0, math.log(5)])


def test_window_by_hand() -> None:
    q, k, v = column(1, 1, 1), column(0, 0, math.log(3)), column(2, 4, 8)
    out, lse = reference.window_attention(q, k, v, TINY, scale=1.0)
    assert out.flatten().tolist() == pytest.approx([2, 3, 7])
    assert lse.flatten().tolist() == pytest.approx([0, math.log(2), math.log(4)])


def test_combination_by_hand() -> None:
    gates = torch.tensor([0.5, 0.25, 1.0], dtype=torch.float64)
    assert reference.combine(column(2), column(4), column(8), gates).item() == 10


def test_empty_rows_have_zero_gradients() -> None:
    q, k, v = (column(1, 2, 3).requires_grad_() for _ in range(3))
    positions = torch.tensor([-1, -1, -1], dtype=torch.int32)
    out, _ = reference.window_attention(q, k, v, TINY, positions=positions)
    for grad in torch.autograd.grad(out.sum(), (q, k, v)):
        assert grad.abs().max() == 0


@pytest.mark.parametrize("name", list(golden.CASES))
def test_reference_has_not_drifted(name: str) -> None:
    stored = json.loads(golden.PATH.read_text())[name]
    found = golden.answers(name)
    assert found["indices"] == stored["indices"]
    torch.testing.assert_close(
        torch.tensor(found["out"]), torch.tensor(stored["out"]), rtol=1e-12, atol=1e-12
    )
    for got, want in zip(found["gradient sums"], stored["gradient sums"], strict=True):
        torch.testing.assert_close(torch.tensor(got), torch.tensor(want), rtol=1e-11, atol=1e-11)


def test_gradients_are_the_derivatives() -> None:
    q, *keys, gates = golden.inputs()
    cfg = NSAConfig(4, 2, 4, 2, 1, 1, 3)

    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
        k_cmp, v_cmp = reference.mean_compress(k, cfg), reference.mean_compress(v, cfg)
        return reference.nsa_attention(q, k_cmp, v_cmp, k, v, k, v, gates, cfg)

    leaves = [t[:, :9].clone().requires_grad_() for t in (q, keys[0], keys[1], gates)]
    assert torch.autograd.gradcheck(run, leaves)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"block_size": 32, "block_stride": 24}, "divide block_size"),
        ({"select_block_size": 40}, "divide select_block_size"),
        ({"block_size": 128}, "exceed"),
        ({"num_selected": 2}, "init_blocks"),
        ({"window_size": 0}, "window_size"),
        ({"block_stride": -16}, "block_stride"),
        ({"score_map": "nearest"}, "score_map"),
    ],
)
def test_a_config_that_does_not_fit_together_is_an_error(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NSAConfig(**arguments)


def test_a_size_that_is_no_integer_is_an_error() -> None:
    with pytest.raises(TypeError, match="window_size"):
        NSAConfig(window_size=512.0)  # type: ignore[arg-type]


def test_config_survives_the_trip_through_integers() -> None:
    cfg = NSAConfig(8, 4, 16, 5, 2, 1, 7, "literal")
    assert NSAConfig.from_ints(cfg.as_ints()) == cfg
