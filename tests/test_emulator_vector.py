"""Vector arithmetic against Python's numbers, lane by lane, and the modifiers by hand."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from nsa_port.emulator import conversions, vector_alu
from nsa_port.emulator.number_formats import KINDS
from nsa_port.emulator.registers import GARBAGE

from .emulator_programs import execute, same

M32, M64, M16 = 2**32 - 1, 2**64 - 1, 2**16 - 1
EDGES = {
    "u32": [0, 1, 2, 5, 31, 32, 0x80, 0xFFFF, 0x7FFFFFFF, 0x80000000, M32, 0x07060504, 0x0D0C0B08],
    "b16": [0, 1, 2, 15, 16, 0x7FFF, 0x8000, M16],
    "u64": [0, 1, 63, 2**32, 2**63, M64, 0x123456789ABCDEF0],
    "f32": [0.0, -0.0, 1.0, -1.5, 2.5, 3.5, 1e-40, 3e38, math.inf, -math.inf, math.nan, 7.25],
    "f16": [0.0, -0.0, 1.0, -1.5, 2.5, 6e-8, 65504.0, math.inf, math.nan, 3.25],
    "f64": [0.0, 1.0, -1.5, 1e300, math.inf, math.nan, 1e-310],
}
EDGES["i32"], EDGES["i64"], EDGES["i16"] = EDGES["u32"], EDGES["u64"], EDGES["b16"]


def samples(kind: str, seed: int) -> np.ndarray:
    """64 lanes: the edges of a kind, in a random order, and random values."""
    random = np.random.default_rng(seed)
    dtype = np.dtype(KINDS[kind].dtype)
    if dtype.kind == "f":
        some = (random.standard_normal(64) * 8).astype(dtype)
    else:
        some = random.integers(0, 256, (64, dtype.itemsize), np.uint8).view(dtype)[:, 0]
    unsigned = np.dtype(f"u{dtype.itemsize}")
    edges = np.array(EDGES[kind], dtype if dtype.kind == "f" else unsigned).view(dtype)
    some[: len(edges)] = edges
    return random.permutation(some)


def s24(a: int) -> int:
    return (a & 0xFFFFFF) - (1 << 24) * (a >> 23 & 1)


def wrap(a: int, bits: int = 32) -> int:
    """As a signed number of so many bits."""
    a &= (1 << bits) - 1
    return a - (1 << bits) * (a >> (bits - 1))


def byte_of(a: int, b: int, code: int) -> int:
    both = (a & M32) << 32 | b & M32
    if code < 8:
        return both >> 8 * code & 255
    if code < 12:
        return 255 * (both >> (16 * (code - 8) + 15) & 1)
    return 0 if code == 12 else 255


def extract(a: int, b: int, c: int) -> int:
    return (a & M32) >> (b & 31) & ((1 << (c & 31)) - 1)


def maximum(*values: float) -> float:
    """The IEEE maxNum: NaN only if all are."""
    numbers = [value for value in values if not math.isnan(value)]
    return max(numbers) if numbers else math.nan


def minimum(*values: float) -> float:
    return -maximum(*(-value for value in values))


def strict(function: Callable[..., float]) -> Callable[..., float]:
    """NaN if any is NaN."""
    return lambda *values: math.nan if any(map(math.isnan, values)) else function(*values)


def median(a: Any, b: Any, c: Any) -> Any:
    if any(isinstance(value, float) and math.isnan(value) for value in (a, b, c)):
        return None  # the ISA has rules of its own for NaN
    return sorted((a, b, c))[1]


def single(a: float) -> float:
    """Rounded to float32."""
    with np.errstate(over="ignore"):
        return float(np.float32(a))


def fma(a: float, b: float, c: float) -> float:
    """Exactly, but for the rounding to float64 at the end."""
    if all(map(math.isfinite, (a, b, c))) and (a * b or c):
        exact = Fraction(a) * Fraction(b) + Fraction(c)
        return float(exact) if exact else a * b + c
    return a * b + c


def safe(function: Callable[[float], float], *, at_infinity: float = math.inf) -> Any:
    def value(a: float) -> float:
        if math.isnan(a) or math.isinf(a):
            return math.nan if math.isnan(a) or a < 0 else at_infinity
        return function(a)

    return value


def rounds(function: Callable[[float], float]) -> Callable[[float], float]:
    return lambda a: math.copysign(float(function(a)), a) if math.isfinite(a) else a


def reciprocal(a: float) -> float:
    return math.copysign(math.inf, a) if a == 0 else 1 / a


def logarithm(a: float) -> float:
    return -math.inf if a == 0 else math.nan if a < 0 else math.log2(a)


def power(a: float) -> float:
    if math.isnan(a):
        return a
    return math.inf if a > 1000 else 0.0 if a < -1000 else 2.0**a


def root(a: float) -> float:
    return a if a == 0 else math.nan if a < 0 or math.isnan(a) else math.sqrt(a)


def reciprocal_root(a: float) -> float:
    return reciprocal(root(a))


def length_of(a: int) -> int:
    return 32 - a.bit_length() if a else M32


def sign_length(a: int) -> int:
    text = format(a, "032b")
    return M32 if len(set(text)) == 1 else len(text) - len(text.lstrip(text[0]))


INTEGERS: dict[str, Callable[..., Any]] = {
    "add_u32": lambda a, b: a + b,
    "add_nc_u32": lambda a, b: a + b,
    "sub_u32": lambda a, b: a - b,
    "sub_nc_u32": lambda a, b: a - b,
    "subrev_u32": lambda a, b: b - a,
    "subrev_nc_u32": lambda a, b: b - a,
    "and_b32": lambda a, b: a & b,
    "or_b32": lambda a, b: a | b,
    "xor_b32": lambda a, b: a ^ b,
    "xnor_b32": lambda a, b: ~(a ^ b),
    "lshlrev_b32": lambda a, b: b << (a & 31),
    "lshrrev_b32": lambda a, b: b >> (a & 31),
    "lshl_b32": lambda a, b: a << (b & 31),
    "mul_lo_u32": lambda a, b: a * b,
    "mul_hi_u32": lambda a, b: a * b >> 32,
    "mul_u32_u24": lambda a, b: (a & 0xFFFFFF) * (b & 0xFFFFFF),
    "mul_hi_u32_u24": lambda a, b: (a & 0xFFFFFF) * (b & 0xFFFFFF) >> 32,
    "max_u32": max,
    "min_u32": min,
    "bcnt_u32_b32": lambda a, b: a.bit_count() + b,
    "bfm_b32": lambda a, b: ((1 << (a & 31)) - 1) << (b & 31),
    "max_i32": max,
    "min_i32": min,
    "mul_lo_i32": lambda a, b: a * b,
    "mul_hi_i32": lambda a, b: a * b >> 32,
    "add_i32": lambda a, b: a + b,
    "add_nc_i32": lambda a, b: a + b,
    "sub_i32": lambda a, b: a - b,
    "sub_nc_i32": lambda a, b: a - b,
    "mul_i32_i24": lambda a, b: s24(a) * s24(b),
    "ashrrev_i32": lambda a, b: b >> (a & 31),
    "add3_u32": lambda a, b, c: a + b + c,
    "lshl_add_u32": lambda a, b, c: (a << (b & 31)) + c,
    "add_lshl_u32": lambda a, b, c: (a + b) << (c & 31),
    "lshl_or_b32": lambda a, b, c: a << (b & 31) | c,
    "and_or_b32": lambda a, b, c: a & b | c,
    "or3_b32": lambda a, b, c: a | b | c,
    "xor3_b32": lambda a, b, c: a ^ b ^ c,
    "xad_u32": lambda a, b, c: (a ^ b) + c,
    "bfi_b32": lambda a, b, c: a & b | ~a & c,
    "bfe_u32": extract,
    "perm_b32": lambda a, b, c: sum(byte_of(a, b, c >> 8 * n & 255) << 8 * n for n in range(4)),
    "alignbit_b32": lambda a, b, c: (a << 32 | b) >> (c & 31),
    "alignbyte_b32": lambda a, b, c: (a << 32 | b) >> 8 * (c & 3),
    "mad_u32_u24": lambda a, b, c: (a & 0xFFFFFF) * (b & 0xFFFFFF) + c,
    "max3_u32": max,
    "min3_u32": min,
    "med3_u32": median,
    "sad_u32": lambda a, b, c: abs(a - b) + c,
    "maxmin_u32": lambda a, b, c: min(max(a, b), c),
    "minmax_u32": lambda a, b, c: max(min(a, b), c),
    "bfe_i32": lambda a, b, c: wrap(extract(a, b, c), c & 31) if c & 31 else 0,
    "mad_i32_i24": lambda a, b, c: s24(a) * s24(b) + c,
    "max3_i32": max,
    "min3_i32": min,
    "med3_i32": median,
    "maxmin_i32": lambda a, b, c: min(max(a, b), c),
    "minmax_i32": lambda a, b, c: max(min(a, b), c),
    "mov_b32": lambda a: a,
    "not_b32": lambda a: ~a,
    "accvgpr_read_b32": lambda a: a,
    "accvgpr_write_b32": lambda a: a,
    "accvgpr_mov_b32": lambda a: a,
    "bfrev_b32": lambda a: int(format(a, "032b")[::-1], 2),
    "ffbh_u32": length_of,
    "clz_i32_u32": length_of,
    "ffbl_b32": lambda a: (a & -a).bit_length() - 1,
    "ctz_i32_b32": lambda a: (a & -a).bit_length() - 1,
    "ffbh_i32": sign_length,
    "cls_i32": sign_length,
    "add_u16": lambda a, b: a + b,
    "add_nc_u16": lambda a, b: a + b,
    "sub_u16": lambda a, b: a - b,
    "sub_nc_u16": lambda a, b: a - b,
    "mul_lo_u16": lambda a, b: a * b,
    "lshlrev_b16": lambda a, b: b << (a & 15),
    "lshrrev_b16": lambda a, b: b >> (a & 15),
    "max_u16": max,
    "min_u16": min,
    "and_b16": lambda a, b: a & b,
    "or_b16": lambda a, b: a | b,
    "xor_b16": lambda a, b: a ^ b,
    "add_nc_i16": lambda a, b: a + b,
    "sub_nc_i16": lambda a, b: a - b,
    "max_i16": max,
    "min_i16": min,
    "ashrrev_i16": lambda a, b: b >> (a & 15),
    "mov_b16": lambda a: a,
    "not_b16": lambda a: ~a,
    "mad_u16": lambda a, b, c: a * b + c,
    "mad_u32_u16": lambda a, b, c: a * b + c,
    "mad_i32_i16": lambda a, b, c: a * b + c,
    "lshl_add_u64": lambda a, b, c: (a << (b & 63)) + c,
    "lshlrev_b64": lambda a, b: b << (a & 63),
    "lshrrev_b64": lambda a, b: b >> (a & 63),
    "ashrrev_i64": lambda a, b: b >> (a & 63),
    "mov_b64": lambda a: a,
    "add_u64": lambda a, b: a + b,
    "add_nc_u64": lambda a, b: a + b,
}
FLOATS: dict[str, Callable[..., Any]] = {
    **{f"add_{kind}": lambda a, b: a + b for kind in ("f16", "f32", "f64")},
    **{f"sub_{kind}": lambda a, b: a - b for kind in ("f16", "f32")},
    **{f"subrev_{kind}": lambda a, b: b - a for kind in ("f16", "f32")},
    **{f"mul_{kind}": lambda a, b: a * b for kind in ("f16", "f32", "f64")},
    "mul_legacy_f32": lambda a, b: 0.0 if a == 0 or b == 0 else a * b,
    **{f"max{num}_{kind}": maximum for num in ("", "_num") for kind in ("f16", "f32")},
    **{f"min{num}_{kind}": minimum for num in ("", "_num") for kind in ("f16", "f32")},
    "max_f64": maximum,
    "min_f64": minimum,
    "maximum_f32": strict(max),
    "minimum_f32": strict(min),
    "fma_f32": fma,
    "fma_f16": fma,
    "fmac_f32": fma,
    "fmac_f16": fma,
    "mad_f32": lambda a, b, c: single(a * b) + c,
    "mac_f32": lambda a, b, c: single(a * b) + c,
    "fma_f64": lambda a, b, c: a * b + c,
    "fmac_f64": lambda a, b, c: a * b + c,
    **{f"max3{num}_f32": maximum for num in ("", "_num")},
    **{f"min3{num}_f32": minimum for num in ("", "_num")},
    **{f"med3{num}_f32": median for num in ("", "_num")},
    "maximum3_f32": strict(max),
    "minimum3_f32": strict(min),
    **{f"maxmin{num}_f32": lambda a, b, c: minimum(maximum(a, b), c) for num in ("", "_num")},
    **{f"minmax{num}_f32": lambda a, b, c: maximum(minimum(a, b), c) for num in ("", "_num")},
    **{f"exp_{kind}": power for kind in ("f16", "f32")},
    **{f"log_{kind}": safe(logarithm) for kind in ("f16", "f32")},
    **{f"rcp_{kind}": reciprocal for kind in ("f16", "f32", "iflag_f32")},
    **{f"rsq_{kind}": reciprocal_root for kind in ("f16", "f32")},
    **{f"sqrt_{kind}": root for kind in ("f16", "f32")},
    **{f"floor_{kind}": rounds(math.floor) for kind in ("f16", "f32")},
    **{f"ceil_{kind}": rounds(math.ceil) for kind in ("f16", "f32")},
    **{f"trunc_{kind}": rounds(math.trunc) for kind in ("f16", "f32")},
    **{f"rndne_{kind}": rounds(round) for kind in ("f16", "f32")},
    "fract_f32": safe(lambda a: a - math.floor(a), at_infinity=math.nan),
    "sin_f32": safe(lambda a: math.sin(2 * math.pi * a), at_infinity=math.nan),
    "cos_f32": safe(lambda a: math.cos(2 * math.pi * a), at_infinity=math.nan),
    "frexp_mant_f32": lambda a: math.frexp(a)[0],
    "frexp_exp_i32_f32": lambda a: math.frexp(a)[1],
    "ldexp_f32": lambda a, b: a * 2.0 ** max(-900, min(b, 900)),
}
INEXACT = ("exp", "log", "rcp", "rsq", "sin", "cos", "fma", "fract")
"""Rounded more than once, here or in the expected value: the last bit may differ."""


def run_operation(name: str) -> tuple[np.ndarray, list[np.ndarray], str]:
    """The result of an instruction on samples, the samples, and the kind of the result."""
    operation = vector_alu.OPERATIONS[name]
    values = [samples(kind, seed) for seed, kind in enumerate(operation.sources)]
    places = [10, 20, 30]
    if operation.accumulates:
        places[len(values) - 1] = 2
    registers = [
        f"v[{place}:{place + 1}]" if KINDS[kind].registers == 2 else f"v{place}"
        for place, kind in zip(places, operation.sources, strict=False)
    ]
    if operation.accumulates:
        registers.pop()
    wide = KINDS[operation.result].registers == 2
    line = ", ".join([f"v_{name} {'v[2:3]' if wide else 'v2'}", *registers])
    result = execute(
        "gfx942", line, vectors=dict(zip(places, map(registered, values), strict=False))
    )
    if wide:
        return result.wide_vector(2, KINDS[operation.result].dtype), values, operation.result
    found = result.vector(2)
    if KINDS[operation.result].half:
        found = found.astype(np.uint16)
    return found.view(KINDS[operation.result].dtype), values, operation.result


def registered(values: np.ndarray) -> np.ndarray:
    """16-bit values as they lie in registers."""
    if values.itemsize != 2:
        return values
    return values.view(np.uint16).astype(np.uint32) | np.uint32(0xABCD0000)


@pytest.mark.parametrize("name", INTEGERS)
def test_integers(name: str) -> None:
    found, values, kind = run_operation(name)
    bits = 8 * found.itemsize
    unsigned = found.view(f"u{found.itemsize}")
    for lane in range(64):
        arguments = [int(value[lane]) for value in values]
        expected = INTEGERS[name](*arguments) & ((1 << bits) - 1)
        assert int(unsigned[lane]) == expected, (name, kind, arguments)


@pytest.mark.parametrize("name", FLOATS)
def test_floats(name: str) -> None:
    found, values, _ = run_operation(name)
    for lane in range(64):
        arguments = [value[lane].item() for value in values]
        if name.startswith("frexp") and not math.isfinite(arguments[0]):
            continue
        try:
            expected = FLOATS[name](*arguments)
        except OverflowError:
            expected = math.inf
        if expected is None:
            continue
        with np.errstate(all="ignore"):
            rounded = found.dtype.type(expected)
        slack = 1e-3 if found.itemsize == 2 else 1.2e-7
        if name.startswith(("sin", "cos")):
            np.testing.assert_allclose(found[lane], rounded, rtol=1e-6, atol=1e-6)
        elif name.startswith(INEXACT):
            np.testing.assert_allclose(found[lane], rounded, rtol=slack, atol=1e-45)
        else:
            same(found[lane], rounded)


def test_every_operation_is_tested() -> None:
    elsewhere = {*conversions.OPERATIONS, "pack_b32_f16", "div_fixup_f32", "fmaak_f32", "fmamk_f32"}
    assert set(vector_alu.OPERATIONS) - elsewhere == {*INTEGERS, *FLOATS}


# --------------------------------------------------------------------------------------- modifiers
def test_literals_of_multiply_add() -> None:
    result = execute(
        "gfx942",
        "v_fmaak_f32 v2, v0, v1, 0x40000000\nv_fmamk_f32 v3, v0, 0x40000000, v1",
        vectors={0: np.float32(3), 1: np.float32(5)},
    )
    assert result.vector(2, np.float32)[0] == 17
    assert result.vector(3, np.float32)[0] == 11


def test_signs_of_operands() -> None:
    result = execute(
        "gfx942",
        "v_add_f32 v2, -v0, |v1|\nv_mul_f32 v3, -|v1|, s4\nv_add_f32 v4, v0, -1.0",
        vectors={0: np.float32(3), 1: np.float32(-5)},
        scalars={4: int(np.float32(2).view(np.uint32))},
    )
    assert [result.vector(n, np.float32)[0] for n in (2, 3, 4)] == [2, -10, 2]


def test_clamp_and_output_factors() -> None:
    result = execute(
        "gfx942",
        """
        v_add_f32 v2, v0, v1 clamp
        v_mul_f32 v3, v0, v1 clamp
        v_add_f32 v4, v0, v1 mul:4
        v_add_f32 v5, v0, v1 div:2
        v_add_u32 v6, v7, v7 clamp
        v_sub_u32 v8, 1, v7 clamp
        """,
        vectors={0: np.float32(3), 1: np.float32(-1.5), 7: np.uint32(0x80000001)},
    )
    assert [result.vector(n, np.float32)[0] for n in (2, 3, 4, 5)] == [1, 0, 6, 0.75]
    assert (result.vector(6)[0], result.vector(8)[0]) == (M32, 0)


def test_op_sel_names_halves() -> None:
    both = np.uint32(0x4000 << 16 | 0x3C00)  # 2.0 above 1.0
    result = execute(
        "gfx942",
        "v_add_f16 v2, v0, v1 op_sel:[1,0,0]\nv_add_f16 v3, v0, v1 op_sel:[1,1,1]",
        vectors={0: both, 1: both, 3: np.uint32(0x1234)},
    )
    assert np.uint16(result.vector(2)[0] & M16).view(np.float16) == 3
    assert result.vector(3)[0] == 0x44001234
    halves = execute("gfx1201", "v_add_f16 v2.h, v0.l, v0.h", vectors={0: both, 2: np.uint32(7)})
    assert halves.vector(2)[0] == 0x42000007


@pytest.mark.parametrize(("architecture", "upper"), [("gfx942", 0), ("gfx1201", 0xABCD)])
def test_the_upper_half_after_a_16_bit_result(architecture: str, upper: int) -> None:
    result = execute(
        architecture, "v_add_f16 v2, v0, v0", vectors={0: np.uint32(0x3C00), 2: 0xABCD1234}
    )
    assert result.vector(2)[0] == upper << 16 | 0x4000


def test_sdwa_takes_and_writes_parts() -> None:
    result = execute(
        "gfx90a",
        """
        v_add_u32_sdwa v2, v0, v1 dst_sel:DWORD src0_sel:BYTE_3 src1_sel:WORD_0
        v_mov_b32_sdwa v3, sext(v0) dst_sel:DWORD src0_sel:BYTE_3
        v_mov_b32_sdwa v4, v1 dst_sel:WORD_1 dst_unused:UNUSED_PRESERVE src0_sel:DWORD
        v_mov_b32_sdwa v5, v1 dst_sel:BYTE_1 dst_unused:UNUSED_PAD src0_sel:DWORD
        v_or_b32_sdwa v6, v0, 3 dst_sel:WORD_0 dst_unused:UNUSED_SEXT src0_sel:WORD_1
        """,
        vectors={0: np.uint32(0xF0000001), 1: np.uint32(0x00020003), 4: np.uint32(0x11112222)},
    )
    expected = [0xF3, 0xFFFFFFF0, 0x00032222, 0x300, 0xFFFFF003]
    assert [int(result.vector(n)[0]) for n in range(2, 7)] == expected


def test_inactive_lanes_keep_what_they_have() -> None:
    result = execute(
        "gfx942",
        "v_mov_b32 v0, 7\nv_lshlrev_b64 v[2:3], 1, v[2:3]",
        vectors={2: np.uint64(2**33)},
        active=[0, 63],
    )
    assert result.vector(0)[[0, 1, 63]].tolist() == [7, 0 if GARBAGE == 0 else GARBAGE, 7]
    assert result.wide_vector(2)[[0, 1, 63]].tolist() == [2**34, 2**33, 2**34]


def test_dual_instructions_read_before_either_writes() -> None:
    result = execute(
        "gfx1100",
        """
        v_dual_mov_b32 v0, v1 :: v_dual_mov_b32 v1, v0
        v_dual_add_f32 v2, v2, v3 :: v_dual_mul_f32 v5, v4, v4
        v_dual_mov_b32 v6, 0 :: v_dual_fmac_f32 v7, v6, v6
        """,
        vectors={
            0: np.uint32(1),
            1: np.uint32(2),
            2: np.float32(3),
            3: np.float32(4),
            4: np.float32(5),
            6: np.float32(2),
            7: np.float32(1),
        },
    )
    assert (result.vector(0)[0], result.vector(1)[0]) == (2, 1)
    assert [result.vector(n, np.float32)[0] for n in (2, 5, 6, 7)] == [7, 25, 0, 5]


@pytest.mark.parametrize("read", ["v_mov_b32 v1, v0", "v_add_f32 v1, v0, 1.0"])
def test_what_was_never_written_is_nan(read: str) -> None:
    assert np.isnan(execute("gfx942", read).vector(1, np.float32)).all()
