"""The demonstration, at a size that takes seconds."""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from nsa_port import NSAConfig, demo
from nsa_port.language_model import ByteLanguageModel, ModelSize

CPU = torch.device("cpu")
TINY = replace(
    demo.scale_for(CPU),
    size=ModelSize(layers=2, hidden_size=16, num_heads=2, num_kv_heads=1, head_dim=8),
    config=NSAConfig(8, 4, 8, 3, 1, 1, 16),
    length=64,
    batch=2,
    held_out=3,
    learning_rate=2e-2,
)


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "scale_for", lambda _: TINY)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "text"
    file.write_bytes(b"".join(b"line %d of the text\n" % i for i in range(1000)))
    return file


def arguments(*words: object) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    demo.add_arguments(parser)
    return parser.parse_args([str(word) for word in words])


def models() -> tuple[ByteLanguageModel, ByteLanguageModel]:
    return demo.make_models(TINY, CPU)


def result(capsys: pytest.CaptureFixture[str], *words: object) -> dict[str, Any]:
    assert demo.main(arguments("--json", *words)) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_demo_says_what_it_found(text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert demo.main(arguments(text, "--steps", 2, "--device", "cpu")) == 0
    out = capsys.readouterr().out
    for expected in (
        f"text: {text}",
        "backend torch",
        "not cuda: [",
        "trained 2 steps",
        "held-out bits per byte: dense ",
        "of dense",
        "bytes/s through its cache",
    ):
        assert expected in out


def test_json_holds_losses_bits_and_the_backends(
    text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = result(capsys, text, "--steps", 3, "--device", "cpu")
    bits = found["held_out_bits_per_byte"]
    assert found["steps"] == 3
    assert {name: len(losses) for name, losses in found["loss"].items()} == {"dense": 3, "nsa": 3}
    assert found["ratio"] == bits["nsa"] / bits["dense"]
    assert found["within_tolerance"] == (found["ratio"] <= demo.TOLERANCE)
    assert set(found["backends"].values()) == {"torch"}
    assert len(found["written"]) > 0


def test_same_steps_give_the_same_losses(text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [result(capsys, text, "--steps", 3, "--device", "cpu") for _ in range(2)]
    assert runs[0]["loss"] == runs[1]["loss"]
    assert runs[0]["written"] == runs[1]["written"]


def test_both_models_learn(text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = result(capsys, text, "--steps", 30, "--device", "cpu")
    for name, losses in found["loss"].items():
        assert losses[-1] < 0.8 * losses[0], name


def test_16_bit_run_compares_and_writes_too(
    text: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "scale_for", lambda _: replace(TINY, dtype=torch.bfloat16))
    assert demo.main(arguments(text, "--steps", 2, "--device", "cpu")) == 0
    out = capsys.readouterr().out
    assert "on cpu in bfloat16" in out
    assert "bytes/s through its cache" in out


def test_time_limit_holds_and_ends_the_schedule(
    text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start = time.monotonic()
    found = result(capsys, text, "--seconds", 1, "--device", "cpu")
    assert found["steps"] >= 1
    assert found["seconds"] < 3
    assert time.monotonic() - start < 15


@pytest.mark.parametrize(("one", "chosen"), [(0.5, 1), (2.0, 2)])
def test_demo_takes_the_faster_number_of_threads_and_restores_it(
    one: float, chosen: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = torch.get_num_threads()
    text = bytes(range(250)) * 40
    monkeypatch.setattr(demo, "_trial", lambda *_: one if torch.get_num_threads() == 1 else 1.0)
    torch.set_num_threads(2)
    try:
        with demo.faster_threads({}, demo.Data(text, TINY, CPU)):
            assert torch.get_num_threads() == chosen
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_models_start_equal_wherever_they_have_the_same_parameters() -> None:
    dense, sparse = models()
    own = sparse.state_dict()
    same = {
        name
        for name, value in dense.state_dict().items()
        if own[name].shape == value.shape and torch.equal(own[name], value)
    }
    assert dense.state_dict().keys() - same == {
        f"blocks.{i}.attention.{name}_proj.weight" for i in range(2) for name in "kv"
    }


def test_held_out_bytes_are_not_trained_on() -> None:
    text = bytes(range(250)) * 40
    data = demo.Data(text, TINY, CPU)
    held_out = len(text) - len(data.training)
    assert held_out == pytest.approx(demo.HELD_OUT * len(text), abs=1)
    assert data.held_out.shape == (3, TINY.length + 1)
    assert data.batch().shape == (TINY.batch, TINY.length + 1)


def test_generation_through_the_cache_is_generation_without_it() -> None:
    _, sparse = models()
    prompt = torch.randint(256, (2, 20), generator=torch.Generator().manual_seed(0))
    written = sparse.generate(prompt, 30, 0.8, torch.Generator().manual_seed(1))
    generator, known = torch.Generator().manual_seed(1), prompt
    with torch.no_grad():
        for _ in range(30):
            probabilities = (sparse(known)[:, -1] / 0.8).softmax(-1)
            known = torch.cat((known, torch.multinomial(probabilities, 1, generator=generator)), 1)
    assert torch.equal(written, known[:, 20:])


def test_default_text_is_the_standard_library() -> None:
    name, text = demo.read_text(None)
    assert "Python's own sources" in name
    assert len(text) > 5_000_000
    assert b"import" in text
    assert text == demo.read_text(None)[1]


def test_curves_are_saved_as_a_picture(text: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    picture = tmp_path / "curves.png"
    assert demo.main(arguments(text, "--steps", 2, "--device", "cpu", "--out", picture)) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_picture_without_matplotlib_names_the_extra_before_training(
    text: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find_spec(name)
    )
    assert demo.main(arguments(text, "--out", "curves.png")) == 2
    captured = capsys.readouterr()
    assert "pip install 'nsa-port[demo]'" in captured.err
    assert captured.out == ""


@pytest.mark.parametrize("with_tqdm", [False, True])
def test_progress_shows_both_losses(
    with_tqdm: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if with_tqdm:
        pytest.importorskip("tqdm")
    else:
        monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with demo.Progress() as progress:
        for i in range(100):
            progress.show(i / 100, {"dense": 2.0, "nsa": 1.5 + i})
        progress.show(1.0, {"dense": 2.0, "nsa": 1.25})
    err = capsys.readouterr().err
    assert "dense 2.000, nsa 1.250" in err
    assert "100%" in err
    if not with_tqdm:
        assert len(err.splitlines()) == 11


def test_short_text_and_missing_file_are_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    short = tmp_path / "short"
    short.write_bytes(b"too short")
    assert demo.main(arguments(short)) == 2
    assert "the text has 9 bytes, the demo needs at least 2600" in capsys.readouterr().err
    assert demo.main(arguments(tmp_path / "missing")) == 2
    assert "No such file" in capsys.readouterr().err
    assert demo.main(arguments(short, "--device", "nonsense")) == 2
    assert "nonsense" in capsys.readouterr().err


def test_command_line_knows_the_demo(text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from nsa_port import cli

    assert cli.main(["demo", str(text), "--steps", "1", "--device", "cpu", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["steps"] == 1
    assert "nsa_port.demo" in sys.modules
