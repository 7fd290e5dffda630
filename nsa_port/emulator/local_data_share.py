"""The local data share (LDS): memory that the waves of one workgroup share, ds_*."""

from __future__ import annotations

import re
from collections.abc import Mapping

import numpy as np
from numpy import int64, uint8, uint16, uint32

from nsa_port.emulator.architectures import Architecture
from nsa_port.emulator.assembly import Instruction
from nsa_port.emulator.errors import OutOfBounds
from nsa_port.emulator.memory import (
    Access,
    access,
    gather,
    place_narrow,
    read_narrow,
    scatter,
    write_narrow,
)
from nsa_port.emulator.number_formats import Array
from nsa_port.emulator.operands import read_vector, write_vector
from nsa_port.emulator.operations import Compile
from nsa_port.emulator.registers import Reader, Step, Waves

READS: Mapping[str, Access] = {
    **{
        f"ds_{verb}_b{width}": access(width)
        for verb in ("read", "load")
        for width in (32, 64, 96, 128)
    },
    **{
        f"ds_{verb}_{sign}{width}{suffix}": access(
            width, signed=sign == "i", half=bool(suffix), high=suffix.endswith("hi")
        )
        for verb in ("read", "load")
        for sign in "ui"
        for width in (8, 16)
        for suffix in ("", "_d16", "_d16_hi")
    },
}
WRITES: Mapping[str, Access] = {
    **{
        f"ds_{verb}_b{width}": access(width)
        for verb in ("write", "store")
        for width in (32, 64, 96, 128)
    },
    **{
        f"ds_{verb}_b{width}{suffix}": access(width, high=suffix != "")
        for verb in ("write", "store")
        for width in (8, 16)
        for suffix in ("", "_d16_hi")
    },
}
_TWO_READS = re.compile(r"ds_(?:read2|load_2addr)(_?st(?:ride)?64)?_b(32|64)$")
_TWO_WRITES = re.compile(r"ds_(?:write2|store_2addr)(_?st(?:ride)?64)?_b(32|64)$")


def lds_positions(waves: Waves, addresses: Array, size: int, instruction: Instruction) -> Array:
    """LDS byte addresses (uint32) -> positions in `waves.lds`, int64 [count, lanes], checked."""
    addresses = waves.whole(addresses.astype(int64))
    wrong = addresses + size > waves.lds_bytes
    if not waves.all_active:
        wrong = wrong & waves.active_lanes
    if wrong.any():
        wave, lane = (int(index) for index in np.argwhere(wrong)[0])
        raise OutOfBounds(
            f"out of bounds: {instruction.name} of {size} bytes at LDS address "
            f"{int(addresses[wave, lane])} by lane {lane}; "
            f"the workgroup has {waves.lds_bytes} bytes"
        )
    if waves.traffic is not None:
        waves.traffic.lds_access(addresses, size)
    if not waves.all_active:
        addresses = np.where(waves.active_lanes, addresses, 0)
    return addresses + waves.lds_base()


def _reader_of_address(instruction: Instruction, position: int, offset: int) -> Reader:
    read = read_vector(instruction.operands[position])
    return lambda waves: read(waves) + uint32(offset)  # wraps, as the hardware's 32 bits do


def compile_read(instruction: Instruction, architecture: Architecture) -> Step:
    """ds_read_b128 and its like, and the narrow ones."""
    form = READS[instruction.name]
    destination = instruction.operands[0]
    address = _reader_of_address(instruction, 1, instruction.number("offset"))
    writers = [write_vector(destination.at(word)) for word in range(max(1, form.words))]
    half = form.half or destination.high is not None
    high = form.high or bool(destination.high)

    def step(waves: Waves) -> None:
        positions = lds_positions(waves, address(waves), form.bytes, instruction)
        if form.words:
            values = gather(waves.lds, positions, form.words)
        else:
            old = waves.vector[destination.register, waves.chosen]
            values = [place_narrow(read_narrow(waves.lds, positions, form), old, half, high)]
        for write, value in zip(writers, values, strict=True):
            write(waves, value)

    return step


def compile_write(instruction: Instruction, architecture: Architecture) -> Step:
    """ds_write_b128 and its like, and the narrow ones."""
    form = WRITES[instruction.name]
    source = instruction.operands[1]
    address = _reader_of_address(instruction, 0, instruction.number("offset"))
    readers = [read_vector(source.at(word)) for word in range(max(1, form.words))]
    shift = uint32(16 if form.high or source.high else 0)

    def step(waves: Waves) -> None:
        positions = lds_positions(waves, address(waves), form.bytes, instruction)
        active = waves.active_lanes
        values = [waves.whole(read(waves))[active] for read in readers]
        if form.words:
            scatter(waves.lds, positions[active], values)
        else:
            write_narrow(waves.lds, positions[active], values[0] >> shift, form.bytes)

    return step


def _two_offsets(instruction: Instruction, match: re.Match[str]) -> tuple[int, list[int]]:
    """(words, byte offsets) of an instruction that has two addresses."""
    words = int(match.group(2)) // 32
    unit = 4 * words * (64 if match.group(1) else 1)
    return words, [instruction.number(offset) * unit for offset in ("offset0", "offset1")]


def compile_two_reads(instruction: Instruction, architecture: Architecture) -> Step:
    """ds_read2_b64 and its like: two places into consecutive registers."""
    match = _TWO_READS.match(instruction.name)
    assert match is not None
    words, offsets = _two_offsets(instruction, match)
    addresses = [_reader_of_address(instruction, 1, offset) for offset in offsets]
    writers = [write_vector(instruction.operands[0].at(word)) for word in range(2 * words)]

    def step(waves: Waves) -> None:
        values: list[Array] = []
        for address in addresses:
            positions = lds_positions(waves, address(waves), 4 * words, instruction)
            values += gather(waves.lds, positions, words)
        for write, value in zip(writers, values, strict=True):
            write(waves, value)

    return step


def compile_two_writes(instruction: Instruction, architecture: Architecture) -> Step:
    """ds_write2_b64 and its like: two sources to two places."""
    match = _TWO_WRITES.match(instruction.name)
    assert match is not None
    words, offsets = _two_offsets(instruction, match)
    addresses = [_reader_of_address(instruction, 0, offset) for offset in offsets]
    sources = [
        [read_vector(source.at(word)) for word in range(words)]
        for source in instruction.operands[1:3]
    ]

    def step(waves: Waves) -> None:
        active = waves.active_lanes
        for address, readers in zip(addresses, sources, strict=True):
            positions = lds_positions(waves, address(waves), 4 * words, instruction)
            values = [waves.whole(read(waves))[active] for read in readers]
            scatter(waves.lds, positions[active], values)

    return step


def compile_transposed_read(instruction: Instruction, architecture: Architecture) -> Step:
    """ds_read_b64_tr_b16/b8 (gfx950): 16 lanes read 16 rows of 8 bytes and share them by column."""
    dtype, per_lane = (uint16, 4) if instruction.name.endswith("b16") else (uint8, 8)
    destination = instruction.operands[0]
    address = _reader_of_address(instruction, 1, instruction.number("offset"))
    writers = [write_vector(destination.at(word)) for word in range(2)]
    lane = np.arange(architecture.lanes)
    group, place = lane // 16 * 16, lane % 16

    def step(waves: Waves) -> None:
        positions = lds_positions(waves, address(waves), 8, instruction)
        rows = np.stack(gather(waves.lds, positions, 2), axis=-1).view(dtype)
        columns = np.empty_like(rows)
        for element in range(per_lane):
            source_lane = group + place // per_lane + 16 // per_lane * element
            columns[..., element] = rows[:, source_lane, place % per_lane]
        words = columns.view(uint32)
        for word, write in enumerate(writers):
            write(waves, words[..., word])

    return step


TABLE: Mapping[str, Compile] = {
    **{name: compile_read for name in READS},
    **{name: compile_write for name in WRITES},
    **{
        f"ds_{verb}{stride}_b{width}": compile_form
        for verb, stride64, compile_form in (
            ("read2", "st64", compile_two_reads),
            ("load_2addr", "_stride64", compile_two_reads),
            ("write2", "st64", compile_two_writes),
            ("store_2addr", "_stride64", compile_two_writes),
        )
        for stride in ("", stride64)
        for width in (32, 64)
    },
    "ds_read_b64_tr_b16": compile_transposed_read,
    "ds_read_b64_tr_b8": compile_transposed_read,
}
