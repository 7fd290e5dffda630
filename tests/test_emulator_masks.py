"""Comparisons, selects, carries and division, which work with masks of lanes."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable

import numpy as np
import pytest

from nsa_port.emulator.comparisons import FLOAT_PREDICATES, PREDICATES

from .emulator_programs import execute, lanes_of, same

M32 = 2**32 - 1
ORDERS: dict[str, Callable[[float, float], bool]] = {
    "lt": operator.lt,
    "eq": operator.eq,
    "le": operator.le,
    "gt": operator.gt,
    "ge": operator.ge,
    "ne": operator.ne,
    "t": lambda a, b: True,
    "tru": lambda a, b: True,
    "f": lambda a, b: False,
}
FLOAT_ORDERS: dict[str, Callable[[float, float], bool]] = {
    **ORDERS,
    "lg": lambda a, b: a < b or a > b,
    "o": lambda a, b: not (math.isnan(a) or math.isnan(b)),
    "u": lambda a, b: math.isnan(a) or math.isnan(b),
    "nge": lambda a, b: not a >= b,
    "nlg": lambda a, b: not (a < b or a > b),
    "ngt": lambda a, b: not a > b,
    "nle": lambda a, b: not a <= b,
    "neq": lambda a, b: a != b,
    "nlt": lambda a, b: not a < b,
}


@pytest.mark.parametrize("kind", ["f32", "f64", "f16"])
@pytest.mark.parametrize("name", FLOAT_PREDICATES)
def test_float_comparisons(name: str, kind: str) -> None:
    values = [-math.inf, -1.0, -0.0, 0.0, 1.0, math.inf, math.nan, 2.0]
    left, right = (grid.reshape(-1) for grid in np.meshgrid(values, values))
    dtype = {"f32": np.float32, "f64": np.float64, "f16": np.float16}[kind]
    sides = [side.astype(dtype) for side in (left, right)]
    if kind == "f16":
        sides = [side.view(np.uint16).astype(np.uint32) for side in sides]
    registers = "v[0:1], v[2:3]" if kind == "f64" else "v0, v2"
    result = execute(
        "gfx942",
        f"v_cmp_{name}_{kind} vcc, {registers}",
        vectors={0: sides[0], 2: sides[1]},
    )
    expected = [
        FLOAT_ORDERS[name](a, b) for a, b in zip(left.tolist(), right.tolist(), strict=True)
    ]
    same(result.lanes(), np.array(expected))


@pytest.mark.parametrize("kind", ["i32", "u32", "i64", "u64", "i16", "u16"])
@pytest.mark.parametrize("name", PREDICATES)
def test_integer_comparisons(name: str, kind: str) -> None:
    bits = int(kind[1:])
    values = [0, 1, 2 ** (bits - 1) - 1, 2 ** (bits - 1), 2**bits - 1, 5, 6, 7]
    left, right = (
        grid.reshape(-1)
        for grid in np.meshgrid(np.array(values, np.uint64), np.array(values, np.uint64))
    )
    dtype = np.dtype(f"{kind[0]}{bits // 8}")
    unsigned = np.dtype(f"u{bits // 8}")
    sides = [side.astype(unsigned) for side in (left, right)]
    numbers = [side.view(dtype).tolist() for side in sides]
    if bits == 16:
        sides = [side.astype(np.uint32) | np.uint32(0x55550000) for side in sides]
    registers = "v[0:1], v[2:3]" if bits == 64 else "v0, v2"
    result = execute(
        "gfx942",
        f"v_cmp_{name}_{kind} s[8:9], {registers}",
        vectors={0: sides[0], 2: sides[1]},
    )
    expected = [ORDERS[name](a, b) for a, b in zip(*numbers, strict=True)]
    same(result.lanes(8), np.array(expected))


@pytest.mark.parametrize("architecture", ["gfx942", "gfx1100"])
def test_inactive_lanes_compare_to_0_and_cmpx_sets_exec(architecture: str) -> None:
    lanes = np.arange(lanes_of(architecture), dtype=np.uint32)
    operands = "vcc, " if architecture == "gfx942" else ""
    result = execute(
        architecture,
        f"v_cmpx_gt_u32 {operands}8, v0\nv_mov_b32 v1, 5",
        vectors={0: lanes, 1: np.uint32(0)},
        active=[1, 3, 9, 20],
    )
    assert np.flatnonzero(result.waves.active[0]).tolist() == [1, 3]
    assert np.flatnonzero(result.vector(1)).tolist() == [1, 3]


def test_classes_of_floats() -> None:
    quiet, signalling = 0x7FC00000, 0x7F800001
    values = np.array(
        [signalling, quiet]
        + [int(np.float32(v).view(np.uint32)) for v in (-math.inf, -1, -1e-40, -0.0)]
        + [int(np.float32(v).view(np.uint32)) for v in (0.0, 1e-40, 1, math.inf)],
        np.uint32,
    )
    vectors = {0: np.resize(values, 64)}
    for bit in range(10):
        result = execute("gfx942", f"v_cmp_class_f32 vcc, v0, {1 << bit}", vectors=vectors)
        assert np.flatnonzero(result.lanes()[:10]).tolist() == [bit]


@pytest.mark.parametrize("architecture", ["gfx942", "gfx1100"])
def test_selects(architecture: str) -> None:
    count = lanes_of(architecture)
    pair = "s[8:9]" if count == 64 else "s8"
    odd = 0xAAAAAAAAAAAAAAAA
    result = execute(
        architecture,
        f"v_cndmask_b32 v2, v0, v1, {pair}\nv_cndmask_b32 v3, 0, v1, vcc\n"
        f"v_cndmask_b32 v4, -v0, |v1|, {pair}",
        vectors={0: np.float32(1), 1: np.float32(-2)},
        scalars={8: odd, 106: odd >> 1},
    )
    lane = np.arange(count)
    same(result.vector(2, np.float32), np.where(lane % 2, -2, 1))
    same(result.vector(3, np.float32), np.where(lane % 2, 0, -2))
    same(result.vector(4, np.float32), np.where(lane % 2, 2, -1))


@pytest.mark.parametrize(
    ("architecture", "names"),
    [
        ("gfx942", ("add_co_u32", "addc_co_u32", "sub_co_u32", "subb_co_u32")),
        ("gfx1100", ("add_co_u32", "add_co_ci_u32", "sub_co_u32", "sub_co_ci_u32")),
    ],
)
def test_carries_join_words_to_64_bits(architecture: str, names: tuple[str, ...]) -> None:
    random = np.random.default_rng(0)
    a, b = random.integers(0, 2**64, (2, lanes_of(architecture)), np.uint64)
    pair = "vcc" if architecture == "gfx942" else "vcc_lo"
    add, add_carry, subtract, subtract_carry = names
    result = execute(
        architecture,
        f"""
        v_{add} v4, {pair}, v0, v2
        v_{add_carry} v5, {pair}, v1, v3, {pair}
        v_{subtract} v6, {pair}, v0, v2
        v_{subtract_carry} v7, {pair}, v1, v3, {pair}
        """,
        vectors={0: a, 2: b},
    )
    same(result.wide_vector(4), a + b)
    same(result.wide_vector(6), a - b)
    same(result.lanes(), a < b)


def test_reversed_subtractions() -> None:
    result = execute(
        "gfx942",
        "v_subrev_co_u32 v2, vcc, v0, v1\nv_subbrev_co_u32 v3, vcc, v0, v1, vcc",
        vectors={0: np.uint32(5), 1: np.uint32(3)},
    )
    assert (result.vector(2)[0], result.vector(3)[0]) == (M32 - 1, M32 - 2)


@pytest.mark.parametrize(
    ("gpu", "lanes", "infix", "carry"),
    [("gfx942", 64, "", "s[8:9]"), ("gfx1100", 32, "", "s8"), ("gfx1201", 32, "co_", "s8")],
)
def test_wide_multiply_add(gpu: str, lanes: int, infix: str, carry: str) -> None:
    random = np.random.default_rng(1)
    a, b = random.integers(0, 2**32, (2, lanes), np.uint32)
    c = random.integers(0, 2**64, lanes, np.uint64)
    unused = "s[10:11]" if lanes == 64 else "null"
    result = execute(
        gpu,
        f"v_mad_{infix}u64_u32 v[4:5], {carry}, v0, v1, v[2:3]\n"
        f"v_mad_{infix}i64_i32 v[6:7], {unused}, v0, v1, 5",
        vectors={0: a, 1: b, 2: c},
    )
    exact = [int(x) * int(y) + int(z) for x, y, z in zip(a, b, c, strict=True)]
    assert result.wide_vector(4).tolist() == [value % 2**64 for value in exact]
    same(result.lanes(8), np.array([value >= 2**64 for value in exact]))
    signed = a.view(np.int32).astype(np.int64) * b.view(np.int32).astype(np.int64) + 5
    same(result.wide_vector(6, np.int64), signed)


DIVISION = """
v_div_scale_f32 v4, {0}, v1, v1, v0
v_div_scale_f32 v5, vcc, v0, v1, v0
v_rcp_f32 v6, v4
v_fma_f32 v7, -v4, v6, 1.0
v_fma_f32 v6, v7, v6, v6
v_mul_f32 v7, v5, v6
v_fma_f32 v8, -v4, v7, v5
v_fma_f32 v7, v8, v6, v7
v_fma_f32 v8, -v4, v7, v5
v_div_fmas_f32 v8, v8, v6, v7
v_div_fixup_f32 v9, v8, v1, v0
"""


def test_the_division_sequence_divides() -> None:
    """What the compiler emits for `/` gives the correctly rounded quotient, special cases too."""
    specials = [0.0, -0.0, 1.0, -3.0, 1e-38, 1e38, math.inf, math.nan]
    top, bottom = (grid.reshape(-1).astype(np.float32) for grid in np.meshgrid(specials, specials))
    random = np.random.default_rng(2)
    for a, b in ((top, bottom), random.standard_normal((2, 64)).astype(np.float32)):
        result = execute("gfx942", DIVISION.format("s[8:9]"), vectors={0: a, 1: b})
        with np.errstate(all="ignore"):
            expected = a / b
        normal = (np.abs(expected) > 1e-37) | (expected == 0) | ~np.isfinite(expected)
        same(result.vector(9, np.float32)[normal], expected[normal])
