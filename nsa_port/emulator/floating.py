"""Floating-point operations of the GPU that numpy does not have, on whole arrays."""

from __future__ import annotations

import numpy as np
from numpy import float16, float32, float64, int32, uint32

from nsa_port.emulator.number_formats import Array


def fused_multiply_add(a: Array, b: Array, c: Array) -> Array:
    """float32 a * b + c with one rounding (through float64, whose product is exact)."""
    wide = np.multiply(a, b, dtype=float64)
    wide = wide + c
    return wide.astype(float32)


def fused_multiply_add_half(a: Array, b: Array, c: Array) -> Array:
    """float16 a * b + c with one rounding."""
    return (a.astype(float64) * b.astype(float64) + c.astype(float64)).astype(float16)


def median(a: Array, b: Array, c: Array) -> Array:
    """The middle one of three."""
    return np.fmax(np.fmin(a, b), np.fmin(np.fmax(a, b), c))


def load_exponent(value: Array, exponent: Array) -> Array:
    """float32 value * 2**exponent, rounded once."""
    return np.ldexp(value.astype(float64), np.clip(exponent, -2000, 2000)).astype(float32)


def fraction(a: Array) -> Array:
    """a - floor(a), below 1 even where that rounds up."""
    return np.minimum(a - np.floor(a), np.nextafter(a.dtype.type(1), a.dtype.type(0)))


def reciprocal(a: Array) -> Array:
    """1 / a."""
    return a.dtype.type(1) / a


def sine(a: Array) -> Array:
    """The sine of `a` turns."""
    return np.sin(a.astype(float64) * 2 * np.pi).astype(float32)


def cosine(a: Array) -> Array:
    """The cosine of `a` turns."""
    return np.cos(a.astype(float64) * 2 * np.pi).astype(float32)


def exponent_field(values: Array) -> Array:
    """The exponent field of float32 values."""
    return ((values.view(uint32) >> uint32(23)) & uint32(0xFF)).astype(int32)


def scale_for_division(value: Array, divisor: Array, dividend: Array) -> tuple[Array, Array]:
    """What v_div_scale_f32 makes of `value` (the divisor or the dividend), and its flag.

    Scales by 2**64 what would be subnormal or overflow on the way; the flag tells v_div_fmas_f32 to
    scale back.
    """
    value, divisor, dividend = np.broadcast_arrays(value, divisor, dividend)
    up, down = load_exponent(value, np.int64(64)), load_exponent(value, np.int64(-64))
    is_divisor, is_dividend = value == divisor, value == dividend
    quotient = np.abs(dividend.astype(float64) / divisor.astype(float64))
    small_inverse = np.abs(1.0 / divisor.astype(float64)) < 2.0**-126
    small_quotient = quotient < 2.0**-126
    exponent_gap = exponent_field(dividend) - exponent_field(divisor)
    cases = [
        ((dividend == 0) | (divisor == 0), np.full_like(value, np.nan), False),
        (exponent_gap >= 96, np.where(is_divisor, up, value), True),
        ((exponent_field(divisor) == 0) & (divisor != 0), up, False),
        (small_inverse & small_quotient, np.where(is_divisor, down, value), True),
        (small_inverse, down, False),
        (small_quotient, np.where(is_dividend, up, value), True),
        (exponent_field(dividend) <= 23, up, False),
    ]
    conditions = [condition for condition, _, _ in cases]
    result = np.select(conditions, [scaled for _, scaled, _ in cases], value)
    flag = np.select(conditions, [np.full(value.shape, flag) for _, _, flag in cases], False)
    return result.astype(float32), flag.astype(bool)


def fix_quotient(quotient: Array, divisor: Array, dividend: Array) -> Array:
    """v_div_fixup_f32: the sign, and the special cases, of a division."""
    negative = np.signbit(divisor) ^ np.signbit(dividend)
    sign = np.where(negative, float32(-1), float32(1))
    result = np.where(np.isnan(quotient), float32(np.inf), np.abs(quotient))  # it overflowed
    vanishes = exponent_field(dividend) - exponent_field(divisor) < -150
    result = np.where(vanishes, float32(0), result)
    result = np.where(np.isinf(divisor) | (dividend == 0), float32(0), result)
    result = np.where((divisor == 0) | np.isinf(dividend), float32(np.inf), result)
    undefined = ((dividend == 0) & (divisor == 0)) | (np.isinf(dividend) & np.isinf(divisor))
    undefined |= np.isnan(dividend) | np.isnan(divisor)
    return np.where(undefined, float32(np.nan), sign * result).astype(float32)
