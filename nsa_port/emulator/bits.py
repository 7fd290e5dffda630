"""Integer and bit operations of the GPU that numpy does not have, on whole arrays."""

from __future__ import annotations

import numpy as np
from numpy import float64, int32, int64, uint8, uint32, uint64

from nsa_port.emulator.number_formats import Array

NONE_SET = uint32(0xFFFFFFFF)
"""What the instructions that look for a bit answer when there is none."""

_SIGN_OF_BYTE = {8: 15, 9: 31, 10: 47, 11: 63}


def count_ones(words: Array) -> Array:
    """uint32 or uint64 -> uint32: bits that are set."""
    words = words.astype(uint64)
    words = words - ((words >> uint64(1)) & uint64(0x5555555555555555))
    words = (words & uint64(0x3333333333333333)) + (
        (words >> uint64(2)) & uint64(0x3333333333333333)
    )
    words = (words + (words >> uint64(4))) & uint64(0x0F0F0F0F0F0F0F0F)
    return ((words * uint64(0x0101010101010101)) >> uint64(56)).astype(uint32)


def count_leading_zeros(words: Array) -> Array:
    """uint32 -> uint32; all ones where the word is zero."""
    bit_length = np.frexp(words.astype(float64))[1].astype(uint32)
    return np.where(words == 0, NONE_SET, uint32(32) - bit_length)


def count_trailing_zeros(words: Array) -> Array:
    """uint32 or uint64 -> uint32; all ones where the word is zero."""
    lowest = words & (~words + words.dtype.type(1))
    return np.where(words == 0, NONE_SET, count_ones(lowest - words.dtype.type(1)))


def count_leading_zeros_wide(words: Array) -> Array:
    """uint64 -> uint32; all ones where the word is zero."""
    high, low = (words >> uint64(32)).astype(uint32), words.astype(uint32)
    in_low = np.where(low == 0, NONE_SET, count_leading_zeros(low) + uint32(32))
    return np.where(high == 0, in_low, count_leading_zeros(high))


def count_sign_bits(words: Array) -> Array:
    """uint32 -> uint32: leading bits that equal the sign bit; all ones if every bit does."""
    signed = words.view(int32)
    return count_leading_zeros(np.where(signed < 0, ~signed, signed).view(uint32))


def reverse_bits(words: Array) -> Array:
    """uint32 -> uint32 with its bits in the opposite order."""
    for shift, mask in ((1, 0x55555555), (2, 0x33333333), (4, 0x0F0F0F0F), (8, 0x00FF00FF)):
        words = ((words >> uint32(shift)) & uint32(mask)) | (
            (words & uint32(mask)) << uint32(shift)
        )
    return (words >> uint32(16)) | (words << uint32(16))


def extract_unsigned(words: Array, offset: Array, width: Array) -> Array:
    """uint32: `width` bits (5 bits of it count) from `offset` on."""
    mask = (uint64(1) << (width & uint32(31)).astype(uint64)) - uint64(1)
    return ((words >> (offset & uint32(31))).astype(uint64) & mask).astype(uint32)


def extract_signed(words: Array, offset: Array, width: Array) -> Array:
    """int32: the same, with the sign of the top bit taken."""
    offset, width = (offset & 31).astype(uint32), (width & 31).astype(int64)
    field = (words.view(uint32) >> offset).astype(int64) & ((int64(1) << width) - 1)
    negative = (field >> (np.maximum(width, 1) - 1)) & 1
    signed = np.where(negative == 1, field - (int64(1) << width), field)
    return np.where(width == 0, 0, signed).astype(int32)


def sign_extend_24(words: Array) -> Array:
    """int32 -> int32: the low 24 bits as a signed number."""
    return (words << int32(8)) >> int32(8)


def multiply_high(left: Array, right: Array) -> Array:
    """uint32 x uint32 -> the upper 32 bits of the product."""
    return ((left.astype(uint64) * right.astype(uint64)) >> uint64(32)).astype(uint32)


def multiply_high_signed(left: Array, right: Array) -> Array:
    """int32 x int32 -> the upper 32 bits of the product."""
    return ((left.astype(int64) * right.astype(int64)) >> int64(32)).astype(int32)


def align_bits(high: Array, low: Array, shift: Array) -> Array:
    """uint32: 32 bits of high:low from bit `shift` on."""
    both = (high.astype(uint64) << uint64(32)) | low.astype(uint64)
    return (both >> (shift & uint32(31)).astype(uint64)).astype(uint32)


def permute_bytes(high: Array, low: Array, selector: Array) -> Array:
    """uint32: each byte of `selector` picks a byte of high:low (0 to 7), a sign, 0x00 or 0xFF."""
    first = selector.flat[0]
    if selector.size == 1 or (selector == first).all():
        bytes_ = [_picked_byte(high, low, (int(first) >> (8 * k)) & 0xFF) for k in range(4)]
        return (
            bytes_[0] | bytes_[1] << uint32(8) | bytes_[2] << uint32(16) | bytes_[3] << uint32(24)
        )
    result = np.zeros(np.broadcast_shapes(high.shape, low.shape, selector.shape), uint32)
    for value in np.unique(selector):
        here = permute_bytes(high, low, np.array([[value]], uint32))
        result = np.where(selector == value, here, result)
    return result


def _picked_byte(high: Array, low: Array, code: int) -> Array:
    if code < 8:
        return ((low if code < 4 else high) >> uint32(8 * (code % 4))) & uint32(0xFF)
    if code in _SIGN_OF_BYTE:
        bit = _SIGN_OF_BYTE[code]
        sign = ((low if bit < 32 else high) >> uint32(bit % 32)) & uint32(1)
        return sign * uint32(0xFF)
    return np.array([[0 if code == 12 else 0xFF]], uint32)


def three_input_logic(first: Array, second: Array, third: Array, table: int) -> Array:
    """Any bitwise function of three words: bit 4a + 2b + c of `table` is its value at (a, b, c)."""
    result = np.zeros_like(first & second & third)
    for row in range(8):
        if (table >> row) & 1:
            term = first if row & 4 else ~first
            term = term & (second if row & 2 else ~second)
            result |= term & (third if row & 1 else ~third)
    return result


def lanes_of_mask(mask: Array, lanes: int) -> Array:
    """uint64 [waves] -> bool [waves, lanes]."""
    as_bytes = np.ascontiguousarray(mask, uint64).view(uint8).reshape(len(mask), 8)
    return np.unpackbits(as_bytes, axis=1, bitorder="little")[:, :lanes].astype(bool)


def mask_of_lanes(lanes: Array) -> Array:
    """bool [waves, lanes] -> uint64 [waves]."""
    packed = np.packbits(lanes, axis=1, bitorder="little")
    word = uint32 if lanes.shape[1] == 32 else uint64
    return packed.view(word).reshape(-1).astype(uint64)
