"""Turning operands into functions that read or write them for the chosen waves."""

from __future__ import annotations

import re

import numpy as np
from numpy import float16, float64, int32, int64, uint16, uint32, uint64

from nsa_port.emulator.architectures import Architecture
from nsa_port.emulator.assembly import EXEC, Operand
from nsa_port.emulator.bits import lanes_of_mask, mask_of_lanes
from nsa_port.emulator.errors import EmulatorError
from nsa_port.emulator.memory import HIGH_HALF, LOW_HALF
from nsa_port.emulator.number_formats import KINDS, Array, bits_of, wide_bits_of
from nsa_port.emulator.registers import Reader, Waves, Writer


def _constant(value: Array) -> Reader:
    return lambda waves: value


# ------------------------------------------------------------------------------- scalar operands
def read_scalar(operand: Operand) -> Reader:
    """uint32 [count] (or [1])."""
    if operand.kind == "scalar":
        register = operand.register
        # A copy: the destination may be the same register.
        return lambda waves: waves.scalar[register, waves.chosen].copy()
    if operand.kind == "constant":
        assert not isinstance(operand.value, str)
        return _constant(np.array([bits_of(operand.value)], uint32))
    if operand.kind == "carry":
        return lambda waves: waves.carry[waves.chosen].astype(uint32)
    if operand.kind == "none":
        return _constant(np.zeros(1, uint32))
    raise EmulatorError(f"{operand.kind} {operand.value!r} cannot be read as a scalar")


def read_wide_scalar(operand: Operand) -> Reader:
    """uint64 [count] (or [1])."""
    if operand.kind == "scalar":
        low, high = operand.register, operand.register + 1

        def read(waves: Waves) -> Array:
            upper = waves.scalar[high, waves.chosen].astype(uint64) << uint64(32)
            return waves.scalar[low, waves.chosen].astype(uint64) | upper

        return read
    if operand.kind == "constant":
        assert not isinstance(operand.value, str)
        return _constant(np.array([wide_bits_of(operand.value)], uint64))
    if operand.kind == "none":
        return _constant(np.zeros(1, uint64))
    raise EmulatorError(f"{operand.kind} {operand.value!r} cannot be read as a wide scalar")


def write_scalar(operand: Operand) -> Writer:
    """Takes uint32 [count] (or [1])."""
    if operand.kind == "none":
        return _discard
    register = operand.register

    def write(waves: Waves, value: Array) -> None:
        waves.scalar[register, waves.chosen] = value
        if register in (EXEC, EXEC + 1):
            waves.exec_changed()

    return write


def write_wide_scalar(operand: Operand) -> Writer:
    """Takes uint64 [count] (or [1])."""
    if operand.kind == "none":
        return _discard
    register = operand.register

    def write(waves: Waves, value: Array) -> None:
        waves.scalar[register, waves.chosen] = value.astype(uint32)
        waves.scalar[register + 1, waves.chosen] = (value >> uint64(32)).astype(uint32)
        if register == EXEC:
            waves.exec_changed()

    return write


def _discard(waves: Waves, value: Array) -> None:
    """The writer of `null`."""


# ------------------------------------------------------------------------------------- lane masks
def read_lane_mask(operand: Operand, architecture: Architecture) -> Reader:
    """bool [count, lanes] of a mask that scalar registers hold."""
    wide = architecture.lanes == 64 or operand.kind == "constant"
    read = read_wide_scalar(operand) if wide else read_scalar(operand)

    def read_mask(waves: Waves) -> Array:
        mask = np.broadcast_to(read(waves).astype(uint64), (waves.count,))
        return lanes_of_mask(mask, waves.lanes)

    return read_mask


def write_lane_mask(operand: Operand, architecture: Architecture) -> Writer:
    """Takes bool [count, lanes]; lanes that are not active get 0."""
    wide = architecture.lanes == 64
    write = write_wide_scalar(operand) if wide else write_scalar(operand)

    def write_mask(waves: Waves, lanes: Array) -> None:
        mask = mask_of_lanes(waves.whole(lanes) & waves.active_lanes)
        write(waves, mask if wide else mask.astype(uint32))

    return write_mask


# ------------------------------------------------------------------------------- vector operands
def read_vector(
    operand: Operand, kind: str = "u32", high: bool = False, part: str | None = None
) -> Reader:
    """The operand as `kind`: [count, lanes], or [count, 1] or [1, 1] where it is uniform.

    high: a 16-bit kind is in the upper half of the register. part: the byte or word that an SDWA
    form takes (`BYTE_0`, `WORD_1`).
    """
    form = KINDS[kind]
    if operand.kind == "constant":
        return _constant(_with_signs(operand, _constant_of_kind(operand, kind)))
    read = _raw(operand, form.registers)
    if part is not None and part != "DWORD":
        read = _part_of(read, part, operand.sign_extend)
    if form.half:
        read = _half_of(read, operand.high if operand.high is not None else high)
    if form.dtype not in (uint32, uint64, uint16):
        read = _viewed(read, form.dtype)
    if form.floating and (operand.negate or operand.absolute):
        unsigned = read

        def read_with_signs(waves: Waves) -> Array:
            return _with_signs(operand, unsigned(waves))

        return read_with_signs
    return read


def _raw(operand: Operand, registers: int) -> Reader:
    """The bits of one or two registers."""
    if operand.kind == "vector":
        register = operand.register
        if registers == 1:
            return lambda waves: waves.vector[register, waves.chosen]

        def read_pair(waves: Waves) -> Array:
            upper = waves.vector[register + 1, waves.chosen].astype(uint64) << uint64(32)
            return waves.vector[register, waves.chosen].astype(uint64) | upper

        return read_pair
    if registers == 2:
        wide = read_wide_scalar(operand)
        return lambda waves: wide(waves)[:, None]
    scalar = read_scalar(operand)
    return lambda waves: scalar(waves)[:, None]


def _viewed(read: Reader, dtype: type) -> Reader:
    return lambda waves: read(waves).view(dtype)


def _half_of(read: Reader, high: bool) -> Reader:
    if high:
        return lambda waves: (read(waves) >> uint32(16)).astype(uint16)
    return lambda waves: read(waves).astype(uint16)


def _part_of(read: Reader, part: str, sign_extend: bool) -> Reader:
    width, shift = part_position(part)
    mask, rest = uint32((1 << width) - 1), 32 - width

    def read_part(waves: Waves) -> Array:
        field = (read(waves) >> uint32(shift)) & mask
        if not sign_extend:
            return field
        return ((field << uint32(rest)).view(int32) >> int32(rest)).view(uint32)

    return read_part


def part_position(part: str) -> tuple[int, int]:
    """`BYTE_2` -> (8, 16): the width and the shift of a part of a register."""
    match = re.match(r"(BYTE|WORD)_(\d)$", part)
    if match is None:
        raise EmulatorError(f"no part of a register is called {part}")
    width = 8 if match.group(1) == "BYTE" else 16
    return width, width * int(match.group(2))


def _constant_of_kind(operand: Operand, kind: str) -> Array:
    value, dtype = operand.value, KINDS[kind].dtype
    assert not isinstance(value, str)
    if KINDS[kind].half:
        if isinstance(value, float):
            return np.array([[value]], float16).view(dtype)
        return np.array([[value & 0xFFFF]], uint16).view(dtype)
    if kind == "f64":
        if isinstance(value, float):
            return np.array([[value]], float64)
        # A literal gives the upper half of a double; small integers are inline constants.
        return np.array([[value << 32 if abs(value) > 64 else value]], int64).view(float64)
    if KINDS[kind].registers == 2:
        return np.array([[wide_bits_of(value)]], uint64).view(dtype)
    return np.array([[bits_of(value)]], uint32).view(dtype)


def _with_signs(operand: Operand, values: Array) -> Array:
    if operand.absolute:
        values = np.abs(values)
    return -values if operand.negate else values


def write_bits(waves: Waves, register: int, bits: Array) -> None:
    """Store uint32 bits into a vector register, for the active lanes."""
    target = waves.vector[register]
    if waves.all_active:
        target[waves.chosen] = bits
    elif isinstance(waves.chosen, slice):
        np.copyto(target[waves.chosen], bits, where=waves.active[waves.chosen])
    else:
        target[waves.chosen] = np.where(waves.active[waves.chosen], bits, target[waves.chosen])


def write_vector(
    operand: Operand,
    kind: str = "u32",
    architecture: Architecture | None = None,
    *,
    high: bool = False,
    keep_other_half: bool | None = None,
) -> Writer:
    """Takes values of `kind`, broadcast to [count, lanes]; only active lanes are written.

    A 16-bit kind goes into one half; the other is kept, or cleared on the GPUs that do so (CDNA,
    for the lower half), unless `keep_other_half` says.
    """
    if operand.kind == "none":
        return _discard
    if operand.kind != "vector":
        raise EmulatorError(f"{operand.kind} {operand.value!r} is no vector destination")
    register, form = operand.register, KINDS[kind]
    if form.registers == 2:

        def write_pair(waves: Waves, value: Array) -> None:
            bits = value.view(uint64)
            write_bits(waves, register, bits.astype(uint32))
            write_bits(waves, register + 1, (bits >> uint64(32)).astype(uint32))

        return write_pair
    if not form.half:
        return lambda waves, value: write_bits(waves, register, value.view(uint32))
    upper = operand.high if operand.high is not None else high
    keeps = keep_other_half
    if keeps is None:
        keeps = architecture is None or architecture.generation >= 10

    def write_half(waves: Waves, value: Array) -> None:
        bits = value.view(uint16).astype(uint32)
        old = waves.vector[register, waves.chosen]
        if upper:
            bits = (old & LOW_HALF) | (bits << uint32(16))
        elif keeps:
            bits = (old & HIGH_HALF) | bits
        write_bits(waves, register, bits)

    return write_half
