"""`nsa-port bench` measures what it says and writes what it measured."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from nsa_port.bench import command, floors, memory, plot, shapes, timing
from nsa_port.bench.floors import Peaks, Work
from nsa_port.bench.shapes import STANDARD, Shape, mean_union, parse_heads
from nsa_port.kernels.geometry import NSAConfig

TINY = NSAConfig(8, 4, 16, 5, 1, 2, 24)


@pytest.fixture(autouse=True)
def _one_round(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "_SECONDS", 0.0)


def arguments(text: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return parser.parse_args(text.split())


# --------------------------------------------------------------------------- what is measured


def test_every_operator_and_the_whole_are_measured() -> None:
    results = command.run("torch", "cpu", lengths=(96,), config=TINY, decode=True, memory=False)
    measured = {(row["group"], row["name"]) for row in results["rows"]}
    for operator in (
        "mean_compress",
        "compressed_attention",
        "selected_attention",
        "window_attention",
        "combine",
    ):
        assert {(operator, "forward"), (operator, "backward")} <= measured
    assert ("select_blocks", "forward") in measured
    assert {("forward", "NSA"), ("backward", "NSA"), ("decode", "NSA")} <= measured
    assert all(row["seconds"] > 0 and row["failed"] is None for row in results["rows"])
    groups = {row["group"] for row in results["ratios"]}
    assert groups == {"forward", "backward", "forward + backward", "decode"}
    assert set(results["shapes"]["16,2,64,64"]["ran"].values()) == {"torch"}
    text = command.table(results)
    assert "forward + backward" in text
    assert "compressed_attention" in text


def test_both_passes_are_the_sum_of_the_two_for_each_form() -> None:
    rows = [
        {"shape": "s", "length": 1, "group": group, "name": name, "seconds": s, "cpu_seconds": s}
        for group, name, s in (
            ("forward", "NSA", 1.0),
            ("forward", "dense flash", 4.0),
            ("forward", "dense cuDNN", 3.0),
            ("backward", "NSA", 2.0),
            ("backward", "dense flash", 5.0),
            ("backward", "dense cuDNN", None),
        )
    ]
    ratios = {row["group"]: row for row in command._ratios(rows)}
    assert ratios["forward"]["dense"] == "dense cuDNN"
    assert ratios["forward + backward"]["dense"] == "dense flash"  # the other has no backward
    assert ratios["forward + backward"]["ratio"] == 3.0 / 9.0


def test_a_form_that_does_not_take_the_shape_is_told_and_not_compared(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*args: Any, **options: Any) -> None:
        raise RuntimeError("no kernel for this\nand more")

    monkeypatch.setattr("nsa_port.bench.passes.dense", refuse)
    results = command.run("torch", "cpu", lengths=(64,), parts=False, memory=False)
    failed = [row for row in results["rows"] if row["name"].startswith("dense")]
    assert {row["failed"] for row in failed} == {"no kernel for this"}
    assert results["ratios"] == []
    assert "cannot" in command.table(results)


def test_memory_on_a_cpu_grows_with_the_length() -> None:
    config = NSAConfig(16, 16, 64, 3, 0, 1, 16)
    short, long = (
        memory.peak_memory(Shape(length, 4, 2, config=config), "NSA", backward=False)
        for length in (256, 8192)
    )
    assert short is not None and long is not None
    assert long > short + 8192 * 4 * 64 * 4  # at least the output


def test_unequal_key_and_value_widths_are_compared_too() -> None:
    results = command.run(
        "torch", "cpu", shapes=[parse_heads("4,2,24,16")], lengths=(64,), parts=False, memory=False
    )
    assert results["ratios"][0]["ratio"] > 0


# --------------------------------------------------------------------------- the command


def test_the_command_writes_its_results(tmp_path: Path) -> None:
    target = tmp_path / "bench.json"
    args = arguments(
        f"--shapes 4,2,16,16 --lengths 64 --backend torch --device cpu --no-parts "
        f"--no-memory --no-backward --out {target}"
    )
    assert command.main(args) == 0
    results = json.loads(target.read_text())
    assert {row["group"] for row in results["rows"]} == {"forward"}
    assert results["backend"] == "torch"
    assert results["machine"]["torch"] == torch.__version__


def test_lengths_may_be_separated_by_spaces_or_commas() -> None:
    assert arguments("--lengths 8192 65536").lengths == [(8192,), (65536,)]
    assert arguments("--lengths 64,96").lengths == [(64, 96)]


def test_shapes_are_names_or_sizes() -> None:
    assert [shape.name for shape in arguments("--shapes A1 8,2,64,32 B").shapes] == [
        "A1",
        "8,2,64,32",
        "B",
    ]
    assert STANDARD["A1"] == shapes.Heads("A1", 64, 4, 192, 128)


@pytest.mark.parametrize(
    ("text", "message"),
    [("A3", "one of A1, A2, B"), ("64,4,128", "H,HK,Dk,Dv"), ("6,4,8,8", "4 key/value heads do")],
)
def test_a_shape_that_is_none_is_refused(
    text: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        arguments(f"--shapes {text}")
    assert message in capsys.readouterr().err


# --------------------------------------------------------------------------- floors


PEAKS = Peaks(flops=721e12, bandwidth=4.3e12)
FLOORS_MS = {
    # shape: compressed, scores, selected, window, combine; compressed, selected, window backward
    "A1": (7.6, 4.6, 3.7, 1.9, 1.0, 19.8, 9.5, 4.9),
    "A2": (6.1, 3.0, 2.9, 1.5, 1.0, 15.2, 7.3, 3.8),
    "B": (3.0, 1.5, 1.5, 0.8, 0.5, 7.6, 3.7, 1.9),
}
"""By hand, at 65536 tokens in bfloat16 with the paper's setting, to 0.1 ms."""

WHOLE_MS = {"A1": (17.8, 34.3), "A2": (13.6, 26.4), "B": (6.8, 13.2)}


@pytest.mark.parametrize("name", STANDARD)
def test_floors_are_those_computed_by_hand(name: str) -> None:
    shape = Shape.of(65536, STANDARD[name], dtype="bfloat16")
    works, whole = floors.operators(shape), floors.whole(shape)
    attention = ("compressed_attention", "selected_attention", "window_attention")
    forward = ("compressed_attention", "select_blocks", *attention[1:], "combine")
    found = [works[operator].forward for operator in forward]
    found += [work for operator in attention if (work := works[operator].backward)]
    assert [PEAKS.floor(work, 2) * 1e3 for work in found] == pytest.approx(
        FLOORS_MS[name], abs=0.06
    )
    assert whole.backward is not None
    assert PEAKS.floor(whole.forward, 2) * 1e3 == pytest.approx(WHOLE_MS[name][0], abs=0.06)
    assert PEAKS.floor(whole.backward, 2) * 1e3 == pytest.approx(WHOLE_MS[name][1], abs=0.06)


def test_dense_floors_are_those_computed_by_hand() -> None:
    dense = floors.dense(Shape.of(65536, STANDARD["A2"], dtype="bfloat16"))
    assert dense.backward is not None
    # 2 * 64 heads * 65536 * 65537 / 2 pairs * 256 columns over 721 TFLOP/s; five products for two.
    assert PEAKS.floor(dense.forward, 2) * 1e3 == pytest.approx(97.61, abs=0.01)
    assert PEAKS.floor(dense.backward, 2) * 1e3 == pytest.approx(244.01, abs=0.02)


@pytest.mark.parametrize("T", [0, 1, 7, 8, 31, 100])
def test_pairs_are_those_of_the_reference(T: int) -> None:
    """Counted one by one over a tiny setting."""
    compressed = window = selected = 0
    for p in range(T):
        blocks = [c for c in range(T) if c * 4 + 8 <= p + 1]
        compressed += len(blocks)
        window += len(range(max(0, p - 23), p + 1))
        own = p // 16
        chosen = {own, *range(min(4, own))}  # five blocks, its own among them
        selected += sum(1 for key in range(p + 1) if key // 16 in chosen)
    assert floors.compressed_pairs(T, TINY) == compressed
    assert floors.window_pairs(T, TINY) == window
    assert floors.selected_pairs(T, TINY) == selected


def test_a_floor_is_the_larger_of_arithmetic_and_traffic() -> None:
    peaks = Peaks(flops=100.0, bandwidth=10.0)
    assert peaks.floor(Work(flops=200.0, elements=1.0), 4) == 2.0
    assert peaks.floor(Work(flops=200.0, elements=10.0), 4) == 4.0


# --------------------------------------------------------------------------- inputs


def test_correlated_neighbours_choose_alike_and_random_ones_do_not() -> None:
    found = {}
    for selection in shapes.SELECTIONS:
        torch.manual_seed(0)
        shape = Shape(4096, 8, 2, 32, 32, backend="torch", selection=selection)
        found[selection] = command._choices(shape)["mean_union"]
    assert 16 < found["correlated"] <= 26 < found["random"] <= 64


def test_the_union_of_neighbours_is_counted() -> None:
    first = [[0, 1, 2], [0, 1, 2], [0, 1, -1], [0, 3, -1]]  # 0, 1, 2, 3
    second = [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10, 11]]
    trailing = [[90, 91, 92]]
    indices = torch.tensor(first + second + trailing, dtype=torch.int32)[None, :, None]
    assert mean_union(indices) == (4 + 12) / 2


# --------------------------------------------------------------------------- plots


def results_of_two_shapes() -> dict[str, Any]:
    rows = [
        {"shape": shape, "length": length, "group": "forward", "name": name, "seconds": seconds}
        for shape in ("A1", "B")
        for length in (128, 64)
        for name, seconds in (("NSA", length / 1e3), ("dense flash", None))
    ]
    sizes = [{"shape": "B", "length": 64, "name": "NSA", "bytes": 5e6}]
    ratios = [{"group": "forward"}]
    machine = {"device_name": "a device"}
    return {"date": "", "machine": machine, "rows": rows, "ratios": ratios, "memory": sizes}


def test_time_and_memory_are_drawn_over_length() -> None:
    assert plot.lines(results_of_two_shapes()) == {
        "forward, ms": {"A1 NSA": [(128, 128.0), (64, 64.0)], "B NSA": [(128, 128.0), (64, 64.0)]},
        "memory over the inputs, MB": {"B NSA": [(64, 5.0)]},
    }


def test_a_plot_without_matplotlib_names_the_extra(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "find_spec", lambda name: None)
    assert command.main(arguments("--plot bench.png")) == 2
    assert "nsa-port[demo]" in capsys.readouterr().err


def test_a_plot_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    target = tmp_path / "bench.png"
    plot.plot(results_of_two_shapes(), str(target))
    assert target.stat().st_size > 0
