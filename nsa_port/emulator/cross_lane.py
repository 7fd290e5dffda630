"""Moving values between the lanes of a wave: DPP, lane reads and writes, permutes, lane counts."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy import int64, uint32, uint64

from nsa_port.emulator.architectures import Architecture
from nsa_port.emulator.assembly import Instruction
from nsa_port.emulator.bits import count_ones
from nsa_port.emulator.errors import EmulatorError
from nsa_port.emulator.number_formats import Array
from nsa_port.emulator.operands import read_scalar, read_vector, write_scalar, write_vector
from nsa_port.emulator.operations import Compile
from nsa_port.emulator.registers import Reader, Step, Waves

_ROW = 16
_ALL_ROWS = 15


# -------------------------------------------------------------------------------------------- DPP
def dpp_sources(instruction: Instruction, lanes: int) -> tuple[Array, Array]:
    """For each lane, the lane that DPP reads, and whether there is one."""
    modifiers = instruction.modifiers
    lane = np.arange(lanes)
    row, place = lane // _ROW * _ROW, lane % _ROW
    exists = np.ones(lanes, bool)
    if "quad_perm" in modifiers:
        source = lane // 4 * 4 + np.array(instruction.numbers("quad_perm", []))[lane % 4]
    elif "dpp8" in modifiers:
        source = lane // 8 * 8 + np.array(instruction.numbers("dpp8", []))[lane % 8]
    elif "row_shl" in modifiers:
        moved = place + instruction.number("row_shl")
        source, exists = row + moved, moved < _ROW
    elif "row_shr" in modifiers:
        moved = place - instruction.number("row_shr")
        source, exists = row + moved, moved >= 0
    elif "row_ror" in modifiers:
        source = row + (place - instruction.number("row_ror")) % _ROW
    elif "row_mirror" in modifiers:
        source = row + _ROW - 1 - place
    elif "row_half_mirror" in modifiers:
        source = lane // 8 * 8 + 7 - lane % 8
    elif "row_newbcast" in modifiers or "row_share" in modifiers:
        source = row + instruction.number("row_newbcast", instruction.number("row_share"))
    elif "row_xmask" in modifiers:
        source = row + (place ^ instruction.number("row_xmask"))
    elif instruction.number("row_bcast") == 15:
        source, exists = row - 1, row >= _ROW
    elif instruction.number("row_bcast") == 31:
        source, exists = lane // 32 * 32 - 1, lane >= 32
    elif "wave_shr" in modifiers:
        source, exists = lane - 1, lane >= 1
    elif "wave_shl" in modifiers:
        source, exists = lane + 1, lane < lanes - 1
    elif "wave_ror" in modifiers:
        source = (lane - 1) % lanes
    elif "wave_rol" in modifiers:
        source = (lane + 1) % lanes
    else:
        raise EmulatorError("unknown DPP control: add it to dpp_sources in cross_lane.py")
    return np.where(exists, source, 0), exists


def _provided(instruction: Instruction, waves: Waves, source: Array, exists: Array) -> Array:
    """Lanes whose source lane exists and is active (or is read all the same, with `fi`)."""
    if waves.all_active or instruction.number("fi"):
        return waves.whole(exists[None])
    return exists[None] & waves.active_lanes[:, source]


def read_through_dpp(instruction: Instruction, read: Reader, architecture: Architecture) -> Reader:
    """The values of other lanes; 0 where there is none."""
    source, exists = dpp_sources(instruction, architecture.lanes)

    def read_others(waves: Waves) -> Array:
        values = waves.whole(read(waves))[:, source]
        provided = _provided(instruction, waves, source, exists)
        return np.where(provided, values, values.dtype.type(0))

    return read_others


def lanes_that_dpp_writes(instruction: Instruction, architecture: Architecture) -> Reader | None:
    """bool [count, lanes], or None if every lane is written."""
    rows = instruction.number("row_mask", _ALL_ROWS)
    banks = instruction.number("bank_mask", _ALL_ROWS)
    zero_fill = "bound_ctrl" in instruction.modifiers
    if zero_fill and rows == banks == _ALL_ROWS:
        return None
    source, exists = dpp_sources(instruction, architecture.lanes)
    lane = np.arange(architecture.lanes)
    in_masks = ((rows >> lane // _ROW) & (banks >> lane % _ROW // 4) & 1).astype(bool)

    def may_write(waves: Waves) -> Array:
        if zero_fill:
            return waves.whole(in_masks[None])
        return in_masks[None] & _provided(instruction, waves, source, exists)

    return may_write


# ----------------------------------------------------------------------- lanes and scalar registers
def compile_read_first_lane(instruction: Instruction, architecture: Architecture) -> Step:
    """v_readfirstlane_b32: the value of the first active lane (lane 0 if none is)."""
    read, write = read_vector(instruction.operands[1]), write_scalar(instruction.operands[0])

    def step(waves: Waves) -> None:
        first = waves.active_lanes.argmax(1)
        write(waves, waves.whole(read(waves))[np.arange(waves.count), first])

    return step


def compile_read_lane(instruction: Instruction, architecture: Architecture) -> Step:
    """v_readlane_b32: the value of the lane that a scalar names."""
    destination, source, lane = instruction.operands
    read, number, write = read_vector(source), read_scalar(lane), write_scalar(destination)

    def step(waves: Waves) -> None:
        lanes = np.broadcast_to(number(waves) & uint32(waves.lanes - 1), (waves.count,))
        write(waves, waves.whole(read(waves))[np.arange(waves.count), lanes])

    return step


def compile_write_lane(instruction: Instruction, architecture: Architecture) -> Step:
    """v_writelane_b32: one lane gets a scalar, active or not."""
    destination, source, lane = instruction.operands
    register, value, number = destination.register, read_scalar(source), read_scalar(lane)

    def step(waves: Waves) -> None:
        lanes = np.broadcast_to(number(waves) & uint32(waves.lanes - 1), (waves.count,))
        values = waves.vector[register, waves.chosen].copy()
        values[np.arange(waves.count), lanes] = value(waves)
        waves.vector[register, waves.chosen] = values

    return step


def compile_lane_count(instruction: Instruction, architecture: Architecture) -> Step:
    """v_mbcnt_lo/hi_u32_b32: bits of a mask below this lane, in its lower or upper word."""
    destination, mask, start = instruction.operands
    read_mask, read_start, write = read_vector(mask), read_vector(start), write_vector(destination)
    lane = np.arange(architecture.lanes)
    first = 32 if "_hi_" in instruction.name else 0
    below = np.array([[(1 << int(n)) - 1 for n in np.clip(lane - first, 0, 32)]], uint32)

    def step(waves: Waves) -> None:
        write(waves, count_ones(read_mask(waves) & below) + read_start(waves))

    return step


# -------------------------------------------------------------------------------------- permutes
def compile_row_permute(instruction: Instruction, architecture: Architecture) -> Step:
    """v_permlane16_b32, v_permlanex16_b32: any lane of the same or of the neighbouring row."""
    destination, source, low, high = instruction.operands
    read, write = read_vector(source), write_vector(destination)
    read_low, read_high = read_scalar(low), read_scalar(high)
    lane = np.arange(architecture.lanes)
    row = lane // _ROW * _ROW
    if instruction.name == "v_permlanex16_b32":
        row = row ^ _ROW
    shift = ((lane % _ROW) * 4).astype(uint64)

    def step(waves: Waves) -> None:
        selector = read_low(waves).astype(uint64) | (read_high(waves).astype(uint64) << uint64(32))
        place = ((selector[:, None] >> shift) & uint64(15)).astype(int64)
        source_lane = waves.whole(place + row)
        write(waves, np.take_along_axis(waves.whole(read(waves)), source_lane, 1))

    return step


def compile_half_exchange(instruction: Instruction, architecture: Architecture) -> Step:
    """v_permlane64_b32: the two halves of a wave change places."""
    destination, source = instruction.operands
    read, write = read_vector(source), write_vector(destination)
    shift = 32 if architecture.lanes == 64 else 0
    return lambda waves: write(waves, np.roll(waves.whole(read(waves)), shift, 1))


def compile_row_swap(instruction: Instruction, architecture: Architecture) -> Step:
    """v_permlane16/32_swap_b32: odd rows of the first register for even rows of the second."""
    first, second = (operand.register for operand in instruction.operands)
    size = 16 if "16" in instruction.name else 32

    def step(waves: Waves) -> None:
        left = waves.vector[first, waves.chosen].reshape(waves.count, -1, 2, size).copy()
        right = waves.vector[second, waves.chosen].reshape(waves.count, -1, 2, size).copy()
        upper = left[:, :, 1].copy()
        left[:, :, 1] = right[:, :, 0]
        right[:, :, 0] = upper
        waves.vector[first, waves.chosen] = left.reshape(waves.shape)
        waves.vector[second, waves.chosen] = right.reshape(waves.shape)

    return step


def compile_swap(instruction: Instruction, architecture: Architecture) -> Step:
    """v_swap_b32: two registers change places."""
    first, second = instruction.operands
    write_first, write_second = write_vector(first), write_vector(second)

    def step(waves: Waves) -> None:
        left = waves.vector[first.register, waves.chosen].copy()
        right = waves.vector[second.register, waves.chosen].copy()
        write_first(waves, right)
        write_second(waves, left)

    return step


# ------------------------------------------------------------ permutes that go through the LDS unit
def compile_swizzle(instruction: Instruction, architecture: Architecture) -> Step:
    """ds_swizzle_b32: a fixed pattern of lanes."""
    destination, source = instruction.operands
    read, write = read_vector(source), write_vector(destination)
    lanes = swizzle_sources(instruction.modifiers.get("offset", 0), architecture.lanes)
    return lambda waves: write(waves, waves.whole(read(waves))[:, lanes])


def swizzle_sources(pattern: object, lanes: int) -> Array:
    """For each lane, the lane that a swizzle pattern names (text or the encoded number)."""
    lane = np.arange(lanes)
    if isinstance(pattern, int):
        if pattern & 0x8000:
            return lane // 4 * 4 + np.array([(pattern >> (2 * n)) & 3 for n in range(4)])[lane % 4]
        keep, set_, flip = pattern & 31, (pattern >> 5) & 31, (pattern >> 10) & 31
        return lane // 32 * 32 + (((lane % 32) & keep | set_) ^ flip)
    mode, *arguments = str(pattern).removeprefix("swizzle(").rstrip(")").split(",")
    if mode == "BITMASK_PERM":
        return lane // 32 * 32 + _bitmask_permute(arguments[0].strip().strip('"'), lane)
    numbers = [int(argument) for argument in arguments]
    if mode == "SWAP":
        return lane ^ numbers[0]
    if mode == "REVERSE":
        return lane // numbers[0] * numbers[0] + numbers[0] - 1 - lane % numbers[0]
    if mode == "BROADCAST":
        return lane // numbers[0] * numbers[0] + numbers[1]
    if mode == "QUAD_PERM":
        return lane // 4 * 4 + np.array(numbers)[lane % 4]
    raise EmulatorError(f"unknown swizzle {mode}: add it to swizzle_sources in cross_lane.py")


def _bitmask_permute(pattern: str, lane: Array) -> Array:
    """Each of five letters, highest bit first: 0, 1, p (preserve) or i (invert)."""
    source = np.zeros_like(lane)
    for bit, letter in enumerate(reversed(pattern)):
        own = (lane >> bit) & 1
        value = (
            own if letter == "p" else 1 - own if letter == "i" else np.full_like(lane, int(letter))
        )
        source |= value << bit
    return source


def compile_pull(instruction: Instruction, architecture: Architecture) -> Step:
    """ds_bpermute_b32: read the lane that an address (lane x 4) names; 0 from inactive lanes."""
    destination, address, source = instruction.operands
    read_address, read, write = read_vector(address), read_vector(source), write_vector(destination)
    offset = uint32(instruction.number("offset"))

    def step(waves: Waves) -> None:
        values = np.where(waves.active_lanes, read(waves), uint32(0))
        lane = ((read_address(waves) + offset) >> uint32(2)) & uint32(waves.lanes - 1)
        write(waves, np.take_along_axis(values, waves.whole(lane.astype(int64)), 1))

    return step


def compile_push(instruction: Instruction, architecture: Architecture) -> Step:
    """ds_permute_b32: write to the lane that an address names; the highest lane wins."""
    destination, address, source = instruction.operands
    read_address, read, write = read_vector(address), read_vector(source), write_vector(destination)
    offset = uint32(instruction.number("offset"))

    def step(waves: Waves) -> None:
        values, active = waves.whole(read(waves)), waves.active_lanes
        lane = ((read_address(waves) + offset) >> uint32(2)) & uint32(waves.lanes - 1)
        target = waves.whole(lane.astype(int64))
        result = np.zeros(waves.shape, uint32)
        for source_lane in range(waves.lanes):
            pushes = np.flatnonzero(active[:, source_lane])
            result[pushes, target[pushes, source_lane]] = values[pushes, source_lane]
        write(waves, result)

    return step


TABLE: Mapping[str, Compile] = {
    "v_readfirstlane_b32": compile_read_first_lane,
    "v_readlane_b32": compile_read_lane,
    "v_writelane_b32": compile_write_lane,
    "v_mbcnt_lo_u32_b32": compile_lane_count,
    "v_mbcnt_hi_u32_b32": compile_lane_count,
    "v_permlane16_b32": compile_row_permute,
    "v_permlanex16_b32": compile_row_permute,
    "v_permlane64_b32": compile_half_exchange,
    "v_permlane16_swap_b32": compile_row_swap,
    "v_permlane32_swap_b32": compile_row_swap,
    "v_swap_b32": compile_swap,
    "ds_swizzle_b32": compile_swizzle,
    "ds_bpermute_b32": compile_pull,
    "ds_permute_b32": compile_push,
}
