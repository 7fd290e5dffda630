"""Atomic operations, with lanes that meet at one address."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from nsa_port.emulator.atomics import ATOMICS

from .emulator_programs import execute, same

LANE = np.arange(64)
DTYPES = {"u32": np.uint32, "i32": np.int32, "f32": np.float32, "u64": np.uint64}
DTYPES |= {"i64": np.int64, "f64": np.float64}


def expected_of(name: str) -> Callable[[Any, Any], Any]:
    """Python's idea of an atomic whose name holds the operation."""
    for part, function in (
        ("swap", lambda old, new: new),
        ("add", lambda old, new: old + new),
        ("sub", lambda old, new: old - new),
        ("min", min),
        ("max", max),
        ("and", lambda old, new: old & new),
        ("xor", lambda old, new: old ^ new),
        ("or", lambda old, new: old | new),
    ):
        if part in name:
            return function
    raise AssertionError(name)


def operands(kind: str) -> np.ndarray:
    random = np.random.default_rng(0)
    dtype = np.dtype(DTYPES[kind])
    if dtype.kind == "f":
        return random.integers(-50, 50, 64).astype(dtype)
    return random.integers(0, 256, (64, dtype.itemsize), np.uint8).view(dtype)[:, 0]


PLAIN = [name for name, atomic in ATOMICS.items() if not atomic.compares and "pk" not in name]


@pytest.mark.parametrize("returns", [False, True], ids=["plain", "returning"])
@pytest.mark.parametrize("name", PLAIN)
def test_atomics_on_global_memory(name: str, returns: bool) -> None:
    """Eight lanes meet at each of eight places, in order."""
    kind = ATOMICS[name].kind
    values, wide = operands(kind), kind.endswith("64")
    size = 8 if wide else 4
    data, before = ("v[2:3]", "v[4:5]") if wide else ("v2", "v4")
    line = f"{before}, v0, {data}, s[40:41] sc0" if returns else f"v0, {data}, s[40:41]"
    start = operands(kind)[:8][::-1].copy()
    result = execute(
        "gfx942",
        f"global_atomic_{name} {line}",
        vectors={0: (LANE % 8 * size).astype(np.uint32), 2: values},
        buffers=[start],
    )
    memory, function = start.tolist(), expected_of(name)
    found: list[Any] = []
    for lane in range(64):
        found.append(memory[lane % 8])
        memory[lane % 8] = wrapped(function(memory[lane % 8], values[lane].item()), kind)
    assert result.buffer(0, DTYPES[kind]).tolist() == memory
    if returns:
        old = result.wide_vector(4, DTYPES[kind]) if wide else result.vector(4, DTYPES[kind])
        assert old.tolist() == found


def wrapped(value: Any, kind: str) -> Any:
    if kind[0] == "f":
        return value
    bits = int(kind[1:])
    value &= (1 << bits) - 1
    return value - (1 << bits) * (value >> (bits - 1)) if kind[0] == "i" else value


@pytest.mark.parametrize(("name", "wide"), [("cmpswap", False), ("cmpswap_x2", True)])
def test_compare_and_swap(name: str, wide: bool) -> None:
    """One lane of all wins a place that held 0."""
    dtype = np.uint64 if wide else np.uint32
    new = (LANE + 1).astype(dtype)
    data = "v[2:5]" if wide else "v[2:3]"
    compared = {4 if wide else 3: np.zeros(64, dtype)}
    result = execute(
        "gfx942",
        f"global_atomic_{name} {'v[6:7]' if wide else 'v6'}, v0, {data}, s[40:41] sc0",
        vectors={0: np.uint32(0), 2: new, **compared},
        buffers=[np.zeros(1, dtype)],
    )
    assert result.buffer(0, dtype)[0] == 1
    old = result.wide_vector(6) if wide else result.vector(6)
    same(old, np.where(LANE == 0, 0, 1))


@pytest.mark.parametrize("kind", ["f16", "bf16"])
@pytest.mark.parametrize("meet", [False, True])
def test_pairs_of_halves_are_added(kind: str, meet: bool) -> None:
    dtype = torch.float16 if kind == "f16" else torch.bfloat16
    values = torch.arange(128).reshape(64, 2).remainder(7).to(dtype)
    words = values.view(torch.int16).numpy().view(np.uint32)[:, 0]
    places = 4 if meet else 64
    result = execute(
        "gfx942",
        f"global_atomic_pk_add_{kind} v0, v1, s[40:41]",
        vectors={0: (LANE % places * 4).astype(np.uint32), 1: words},
        buffers=[np.zeros(places, np.uint32)],
    )
    found = torch.from_numpy(result.buffer(0, np.int16).copy()).view(dtype).reshape(places, 2)
    assert torch.equal(found, values.reshape(-1, places, 2).sum(0).to(dtype))


def test_rdna_spells_the_return_differently() -> None:
    vectors = {0: np.uint32(0), 1: np.uint32(1)}
    for architecture, modifier in (("gfx1100", "glc"), ("gfx1201", "th:TH_ATOMIC_RETURN")):
        result = execute(
            architecture,
            f"global_atomic_add_u32 v2, v0, v1, s[40:41] {modifier}",
            vectors=vectors,
            buffers=[np.zeros(1, np.uint32)],
        )
        same(result.vector(2), LANE[:32])


def test_buffer_atomics_respect_the_descriptor() -> None:
    result = execute(
        "gfx942",
        "s_mov_b32 s8, s40\ns_mov_b32 s9, s41\ns_mov_b32 s10, 16\ns_mov_b32 s11, 0\n"
        "buffer_atomic_add_f32 v1, v0, s[8:11], 0 offen\n"
        "buffer_atomic_add v2, v0, s[8:11], 0 offen offset:4 sc0",
        vectors={0: (LANE * 8).astype(np.uint32), 1: np.float32(1), 2: np.uint32(5)},
        buffers=[np.zeros(8, np.uint32)],
    )
    assert result.buffer(0, np.uint32).tolist() == [0x3F800000, 5, 0x3F800000, 5, 0, 0, 0, 0]
    assert result.vector(2)[:3].tolist() == [0, 0, 0]


@pytest.mark.parametrize("name", [name for name in PLAIN if "_" in name and "x2" not in name])
def test_atomics_on_the_lds(name: str) -> None:
    kind = ATOMICS[name].kind
    wide = kind.endswith("64")
    size = 8 if wide else 4
    data, before = ("v[2:3]", "v[4:5]") if wide else ("v2", "v4")
    operation, _, suffix = name.rpartition("_")
    values, start = operands(kind), operands(kind)[:16].copy()
    result = execute(
        "gfx942",
        f"ds_{name} v0, {data}\nds_{operation}_rtn_{suffix} {before}, v0, {data} offset:{8 * size}",
        vectors={0: (LANE % 8 * size).astype(np.uint32), 2: values},
        lds=start,
    )
    memory, function, found = start.tolist(), expected_of(name), []
    for base in (0, 8):
        for lane in range(64):
            place = base + lane % 8
            found.append(memory[place])
            memory[place] = wrapped(function(memory[place], values[lane].item()), kind)
    assert result.lds(DTYPES[kind])[:16].tolist() == memory
    old = result.wide_vector(4, DTYPES[kind]) if wide else result.vector(4, DTYPES[kind])
    assert old.tolist() == found[64:]
