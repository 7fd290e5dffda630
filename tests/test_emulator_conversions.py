"""Conversions between number formats, against PyTorch's own."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from nsa_port.emulator import conversions
from nsa_port.emulator.architectures import ARCHITECTURES
from nsa_port.emulator.conversions import float8_format
from nsa_port.emulator.number_formats import float8_values

from .emulator_programs import execute, lanes_of, same

FLOAT8 = {
    ("gfx942", "fp8"): torch.float8_e4m3fnuz,
    ("gfx942", "bf8"): torch.float8_e5m2fnuz,
    ("gfx950", "fp8"): torch.float8_e4m3fn,
    ("gfx950", "bf8"): torch.float8_e5m2,
    ("gfx1201", "fp8"): torch.float8_e4m3fn,
    ("gfx1201", "bf8"): torch.float8_e5m2,
}
FLOATS = np.array(
    [
        *(0, -0.0, 0.5, 1.5, 2.5, -2.5, 3.49, 255.0, 65504.0, 65520.0, 1e-8, 6e-8),
        *(1e10, -1e10, 4e9, 3e38, math.inf, -math.inf, math.nan),
    ],
    np.float32,
)


def floats(lanes: int = 64) -> np.ndarray:
    random = np.random.default_rng(0).standard_normal(64).astype(np.float32) * 100
    random[: len(FLOATS)] = FLOATS
    return random[:lanes]


def halves(values: torch.Tensor) -> np.ndarray:
    return values.contiguous().view(torch.int16).numpy().view(np.uint16)


def torch_of(values: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(values.copy())


def packed(low: np.ndarray, high: np.ndarray) -> np.ndarray:
    return low.astype(np.uint32) | high.astype(np.uint32) << 16


def nan_free(bits: np.ndarray, values: np.ndarray) -> np.ndarray:
    return np.where(np.isnan(values), 0, bits)


def cut(values: np.ndarray, low: int, high: int) -> np.ndarray:
    wide = np.nan_to_num(values.astype(np.float64), nan=0, posinf=1e30, neginf=-1e30)
    return np.clip(wide, low, high).astype(np.int64).astype(np.uint32)


def test_float32_to_integers() -> None:
    values = floats()
    lines = ("cvt_i32_f32", "cvt_u32_f32", "cvt_flr_i32_f32", "cvt_rpi_i32_f32")
    result = execute(
        "gfx942",
        "\n".join(f"v_{name} v{n + 2}, v0" for n, name in enumerate(lines)),
        vectors={0: values},
    )
    i32 = (-(2**31), 2**31 - 1)
    same(result.vector(2), cut(np.trunc(values), *i32))
    same(result.vector(3), cut(np.trunc(values), 0, 2**32 - 1))
    same(result.vector(4), cut(np.floor(values), *i32))
    same(result.vector(5), cut(np.floor(values + np.float32(0.5)), *i32))


def test_integers_to_floats() -> None:
    values = np.random.default_rng(1).integers(0, 2**32, 64, np.uint32)
    values[:4] = [0, 1, 2**31, 2**32 - 1]
    result = execute(
        "gfx942",
        """
        v_cvt_f32_i32 v2, v0
        v_cvt_f32_u32 v3, v0
        v_cvt_f32_ubyte0 v4, v0
        v_cvt_f32_ubyte1 v5, v0
        v_cvt_f32_ubyte2 v6, v0
        v_cvt_f32_ubyte3 v7, v0
        v_cvt_f64_i32 v[8:9], v0
        v_cvt_f64_u32 v[10:11], v0
        v_cvt_f16_u16 v12, v0
        v_cvt_f16_i16 v13, v0
        """,
        vectors={0: values},
    )
    same(result.vector(2, np.float32), values.view(np.int32).astype(np.float32))
    same(result.vector(3, np.float32), values.astype(np.float32))
    for byte in range(4):
        same(result.vector(4 + byte, np.float32), values.view(np.uint8)[byte::4])
    same(result.wide_vector(8, np.float64), values.view(np.int32).astype(np.float64))
    same(result.wide_vector(10, np.float64), values.astype(np.float64))
    low = values.astype(np.uint16)
    with np.errstate(over="ignore"):
        same(result.vector(12), low.astype(np.float16).view(np.uint16))
        same(result.vector(13), low.view(np.int16).astype(np.float16).view(np.uint16))


def test_integers_of_16_bits_are_extended() -> None:
    result = execute(
        "gfx1201",
        "v_cvt_u32_u16 v1, v0\nv_cvt_i32_i16 v2, v0",
        vectors={0: np.uint32(0x1234FFFE)},
    )
    assert (result.vector(1)[0], result.vector(2)[0]) == (0xFFFE, 0xFFFFFFFE)


def test_float16_float64_and_back() -> None:
    values = floats()
    result = execute(
        "gfx942",
        """
        v_cvt_f16_f32 v2, v0
        v_cvt_f32_f16 v3, v2
        v_cvt_f64_f32 v[4:5], v0
        v_cvt_f32_f64 v6, v[4:5]
        v_cvt_i32_f64 v7, v[4:5]
        v_cvt_u32_f64 v8, v[4:5]
        v_pack_b32_f16 v9, v2, v2
        """,
        vectors={0: values},
    )
    half = torch_of(values).half()
    same(result.vector(3, np.float32), half.float().numpy())
    same(nan_free(result.vector(2), values), nan_free(halves(half), values))
    same(result.wide_vector(4, np.float64), values.astype(np.float64))
    same(result.vector(6, np.float32), values)
    same(result.vector(7), cut(np.trunc(values), -(2**31), 2**31 - 1))
    same(result.vector(8), cut(np.trunc(values), 0, 2**32 - 1))
    same(nan_free(result.vector(9), values), nan_free(packed(halves(half), halves(half)), values))


def test_bfloat16_and_back() -> None:
    values = floats(32)
    result = execute(
        "gfx1201",
        "v_cvt_bf16_f32 v2, v0\nv_cvt_f32_bf16 v3, v2\nv_cvt_pk_bf16_f32 v4, v0, v1",
        vectors={0: values, 1: np.float32(1.0), 2: np.uint32(0)},
    )
    expected = torch_of(values).bfloat16()
    same(result.vector(3, np.float32), expected.float().numpy())
    same(nan_free(result.vector(2), values), nan_free(halves(expected), values))
    one = np.full(32, 0x3F80)
    same(nan_free(result.vector(4), values), nan_free(packed(halves(expected), one), values))


def test_packing_float16_to_nearest_and_toward_zero() -> None:
    values = floats()
    result = execute(
        "gfx950",
        "v_cvt_pk_f16_f32 v2, v0, v0\nv_cvt_pkrtz_f16_f32 v3, v0, v0",
        vectors={0: values},
    )
    half = halves(torch_of(values).half())
    same(nan_free(result.vector(2), values), nan_free(packed(half, half), values))
    with np.errstate(over="ignore"):
        nearest = values.astype(np.float16)
        toward = np.where(
            np.abs(nearest.astype(np.float32)) > np.abs(values),
            np.nextafter(nearest, np.float16(0)),
            nearest,
        )
    same((result.vector(3) >> 16).astype(np.uint16).view(np.float16), toward)
    expected = execute("gfx1201", "v_cvt_pk_rtz_f16_f32 v3, v0, v0", vectors={0: values[:32]})
    same(nan_free(expected.vector(3), values[:32]), nan_free(result.vector(3), values)[:32])


@pytest.mark.parametrize(("architecture", "form"), FLOAT8)
def test_every_8_bit_float_has_its_value(architecture: str, form: str) -> None:
    bytes_ = torch.arange(256, dtype=torch.uint8)
    expected = bytes_.view(FLOAT8[architecture, form]).float().numpy()
    same(float8_values(float8_format(form, ARCHITECTURES[architecture])), expected)


@pytest.mark.parametrize(("architecture", "form"), FLOAT8)
def test_8_bit_floats_both_ways(architecture: str, form: str) -> None:
    dtype, lanes = FLOAT8[architecture, form], lanes_of(architecture)
    largest = torch.finfo(dtype).max
    values = np.clip(
        np.random.default_rng(2).standard_normal(lanes) * largest / 3, -largest, largest
    )
    values[:6] = [0.0, 1.0, -1.0, largest, -largest, largest / 2**15]
    values = values.astype(np.float32)
    result = execute(
        architecture,
        f"""
        v_cvt_pk_{form}_f32 v2, v0, v1
        v_cvt_pk_{form}_f32 v2, v1, v0 op_sel:[0,0,1]
        v_cvt_pk_f32_{form} v[4:5], v2
        v_cvt_pk_f32_{form} v[6:7], v2 op_sel:[1,0]
        v_cvt_f32_{form} v8, v2
        """,
        vectors={0: values, 1: -values, 2: np.uint32(0)},
    )
    code = torch_of(values).to(dtype)
    minus = (-torch_of(values)).to(dtype)
    one, other = (c.view(torch.uint8).numpy().astype(np.uint32) for c in (code, minus))
    same(result.vector(2), one | other << 8 | other << 16 | one << 24)
    rounded = code.float().numpy()
    for register, expected in (
        (4, rounded),
        (5, -rounded),
        (6, -rounded),
        (7, rounded),
        (8, rounded),
    ):
        same(result.vector(register, np.float32), expected)


@pytest.mark.parametrize("form", ["fp8", "bf8"])
@pytest.mark.parametrize("kind", ["f32", "f16", "bf16"])
def test_scaled_8_bit_floats(form: str, kind: str) -> None:
    dtype = FLOAT8["gfx950", form]
    values = np.random.default_rng(3).standard_normal(64).astype(np.float32)
    scale = np.float32(4.0)
    if kind == "f32":
        read, vectors = "v0, v1", {0: values, 1: values}
    else:
        narrow = torch_of(values).to(torch.float16 if kind == "f16" else torch.bfloat16)
        values = narrow.float().numpy()
        read = "v0"
        vectors = {0: packed(halves(narrow), halves(narrow)), 1: values}
    result = execute(
        "gfx950",
        f"""
        v_cvt_scalef32_pk_{form}_{kind} v2, {read}, v3
        v_cvt_scalef32_pk_{kind}_{form} {"v[4:5]" if kind == "f32" else "v4"}, v2, v3
        """,
        vectors={**vectors, 2: np.uint32(0), 3: scale},
    )
    code = (torch_of(values) / 4).to(dtype)
    same(result.vector(2) & 0xFF, code.view(torch.uint8).numpy())
    expected = code.float().numpy() * scale
    if kind == "f32":
        same(result.vector(4, np.float32), expected)
        same(result.vector(5, np.float32), expected)
    else:
        dtype16 = torch.float16 if kind == "f16" else torch.bfloat16
        bits = halves(torch_of(expected).to(dtype16))
        same(result.vector(4), packed(bits, bits))


def test_every_conversion_is_tested() -> None:
    text = Path(__file__).read_text()
    missing = [
        name
        for name in conversions.OPERATIONS
        if name not in text and not name.startswith(("cvt_nearest", "cvt_floor", "cvt_f32_ubyte"))
    ]
    assert missing == []
