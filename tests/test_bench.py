"""`nsa-port bench` measures what it says and writes what it measured."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest

from nsa_port import bench
from nsa_port.kernels.geometry import NSAConfig

TINY = NSAConfig(8, 4, 16, 5, 1, 2, 24)


@pytest.fixture(autouse=True)
def _one_round(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "_SECONDS", 0.0)


def test_every_operator_and_the_whole_are_measured() -> None:
    results = bench.run("torch", "cpu", lengths=(96,), config=TINY, decode=True, memory=False)
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
    assert {("forward + backward", "NSA"), ("decode", "NSA")} <= measured
    assert all(row["seconds"] > 0 and row["failed"] is None for row in results["rows"])
    assert {row["group"] for row in results["ratios"]} == {"forward + backward", "decode"}
    assert "forward + backward" in bench.table(results)


def test_memory_on_a_cpu_grows_with_the_length() -> None:
    config = NSAConfig(16, 16, 64, 3, 0, 1, 16)
    short, long = (
        bench.peak_memory(bench.Shape(length, 4, 2, config=config), "nsa", backward=False)
        for length in (256, 8192)
    )
    assert long > short + 8192 * 4 * 64 * 4  # at least the output


def test_the_command_writes_its_results(tmp_path: Path) -> None:
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    target = tmp_path / "bench.json"
    args = parser.parse_args(
        f"--lengths 64 --backend torch --device cpu --heads 4 --kv-heads 2 --no-parts "
        f"--no-memory --no-backward --json {target}".split()
    )
    assert bench.main(args) == 0
    results = json.loads(target.read_text())
    assert {row["group"] for row in results["rows"]} == {"forward"}
    assert results["backend"] == "torch"


def test_unequal_key_and_value_widths_are_compared_too() -> None:
    results = bench.run(
        "torch", "cpu", lengths=(64,), key_dim=24, value_dim=16, parts=False, memory=False
    )
    assert results["ratios"][0]["ratio"] > 0


def test_a_plot_without_matplotlib_names_the_extra(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    monkeypatch.setattr(bench, "find_spec", lambda name: None)
    assert bench.main(parser.parse_args(["--plot", "bench.png"])) == 2
    assert "nsa-port[demo]" in capsys.readouterr().err


def test_a_plot_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    results = bench.run("torch", "cpu", lengths=(64, 96), config=TINY, parts=False, memory=False)
    target = tmp_path / "bench.png"
    bench.plot(results, str(target))
    assert target.stat().st_size > 0
