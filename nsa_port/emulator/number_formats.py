"""The number formats of the GPU that numpy lacks, and rounding into the ones that it has.

A *kind* names how an instruction reads or writes 16, 32 or 64 bits: `u32`, `i32` and `f32` are 32
bits of one register, `f16`, `i16` and `b16` (raw bits) one half of a register, and `u64`, `i64` and
`f64` two registers.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy import float16, float32, float64, int16, int32, int64, uint16, uint32, uint64
from numpy.typing import NDArray

Array = NDArray


@dataclass(frozen=True, slots=True)
class Kind:
    dtype: type
    registers: int = 1

    @property
    def half(self) -> bool:
        return np.dtype(self.dtype).itemsize == 2

    @property
    def floating(self) -> bool:
        return np.dtype(self.dtype).kind == "f"


KINDS = {
    "u32": Kind(uint32),
    "i32": Kind(int32),
    "f32": Kind(float32),
    "f16": Kind(float16),
    "b16": Kind(uint16),
    "i16": Kind(int16),
    "u64": Kind(uint64, 2),
    "i64": Kind(int64, 2),
    "f64": Kind(float64, 2),
}

LEAST_NORMAL_HALF = float32(2.0**-14)
LEAST_NORMAL_SINGLE = float32(2.0**-126)


def bits_of(value: int | float) -> int:
    """The 32 bits of a constant operand: an integer's own, or those of a float32."""
    if isinstance(value, float):
        return int(np.array(value, float32).view(uint32))
    return value & 0xFFFFFFFF


def wide_bits_of(value: int | float) -> int:
    """The 64 bits of a constant operand: an integer's own, or those of a float64."""
    if isinstance(value, float):
        return int(np.array(value, float64).view(uint64))
    return value & 0xFFFFFFFFFFFFFFFF


def float32_of_bfloat16(bits: Array) -> Array:
    """uint16 bits of bfloat16 -> float32, exactly."""
    return (bits.astype(uint32) << uint32(16)).view(float32)


def bfloat16_of_float32(values: Array) -> Array:
    """float32 -> uint16 bits of bfloat16, to the nearest, ties to even."""
    bits = np.ascontiguousarray(values, float32).view(uint32)
    high = bits >> uint32(16)
    rounded = (bits + uint32(0x7FFF) + (high & uint32(1))) >> uint32(16)
    quiet_nan = high | uint32(0x40)
    return np.where(np.isnan(values), quiet_nan, rounded).astype(uint16)


def float16_toward_zero(values: Array) -> Array:
    """float32 -> uint16 bits of float16, rounded toward zero."""
    nearest = values.astype(float16)
    away = np.abs(nearest.astype(float32)) > np.abs(values)
    bits = nearest.view(uint16)
    return np.where(away, bits - uint16(1), bits)


def xfloat32_of_float32(values: Array) -> Array:
    """float32 -> float32 with the 10 bits of mantissa that xf32 matrix instructions keep."""
    bits = np.ascontiguousarray(values, float32).view(uint32)
    rounded = bits + uint32(0xFFF) + ((bits >> uint32(13)) & uint32(1))
    return (rounded & uint32(0xFFFFE000)).view(float32)


def pack_halves(low: Array, high: Array) -> Array:
    """Two arrays of 16-bit values -> one of uint32."""
    return low.view(uint16).astype(uint32) | (high.view(uint16).astype(uint32) << uint32(16))


def saturate(values: Array, least: int, most: int) -> Array:
    """float -> float64 cut to [least, most]; NaN becomes 0."""
    wide = np.nan_to_num(values.astype(float64), nan=0.0, posinf=1e30, neginf=-1e30)
    return np.clip(wide, least, most)


@dataclass(frozen=True, slots=True)
class Float8:
    """An 8-bit float; `finite_nuz` formats have no infinity, no -0, and one NaN (0x80)."""

    name: str
    exponent_bits: int
    bias: int
    finite_nuz: bool

    @property
    def mantissa_bits(self) -> int:
        return 7 - self.exponent_bits

    def decode(self, byte: int) -> float:
        """The value of one byte."""
        if self.finite_nuz and byte == 0x80:
            return np.nan
        sign = -1.0 if byte & 0x80 else 1.0
        exponent = (byte & 0x7F) >> self.mantissa_bits
        mantissa = byte & ((1 << self.mantissa_bits) - 1)
        fraction = mantissa / (1 << self.mantissa_bits)
        if not self.finite_nuz:
            if self.name == "e4m3" and byte & 0x7F == 0x7F:
                return np.nan
            if self.name == "e5m2" and exponent == 31:
                return np.nan if mantissa else sign * np.inf
        if exponent == 0:
            return sign * fraction * 2.0 ** (1 - self.bias)
        return sign * (1 + fraction) * 2.0 ** (exponent - self.bias)


FLOAT8 = {
    ("fp8", False): Float8("e4m3", 4, 7, finite_nuz=False),
    ("bf8", False): Float8("e5m2", 5, 15, finite_nuz=False),
    ("fp8", True): Float8("e4m3", 4, 8, finite_nuz=True),
    ("bf8", True): Float8("e5m2", 5, 16, finite_nuz=True),
}
"""By the instruction's name for the format, and whether the GPU's formats are FNUZ."""


@cache
def float8_values(form: Float8) -> Array:
    """float32 [256]: what each byte stands for."""
    return np.array([form.decode(byte) for byte in range(256)], float32)


@cache
def _positive_float8(form: Float8) -> tuple[Array, Array]:
    """The finite non-negative bytes of a format and their values, both ascending."""
    values = float8_values(form)[:128].astype(float64)
    finite = np.flatnonzero(np.isfinite(values))
    return finite, values[finite]


def float8_of_float32(values: Array, form: Float8) -> Array:
    """float32 -> uint32 holding an 8-bit float, to the nearest even, cut to the largest finite."""
    codes, ladder = _positive_float8(form)
    magnitude = np.minimum(np.abs(values.astype(float64)), ladder[-1])
    above = np.clip(np.searchsorted(ladder, magnitude), 1, len(ladder) - 1)
    to_lower, to_upper = magnitude - ladder[above - 1], ladder[above] - magnitude
    take_upper = (to_lower > to_upper) | ((to_lower == to_upper) & (codes[above] % 2 == 0))
    code = np.where(take_upper, codes[above], codes[above - 1]).astype(uint32)
    negative = np.signbit(values) & ~((code == 0) & form.finite_nuz)
    code = np.where(negative, code | uint32(0x80), code)
    nan = uint32(0x80 if form.finite_nuz else 0x7F)
    return np.where(np.isnan(values), nan, code).astype(uint32)
