"""Vector loads and stores: global, flat, buffer and scratch memory, and loads into the LDS.

Two things make an instruction: where its lanes access (a `Locate`), and what they access (an
`Access`). Every position that a `Locate` gives has been checked.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy import int64, uint32, uint64

from nsa_port.emulator.architectures import Architecture
from nsa_port.emulator.assembly import NONE, Instruction, Operand
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
from nsa_port.emulator.operands import (
    read_scalar,
    read_vector,
    read_wide_scalar,
    write_vector,
)
from nsa_port.emulator.operations import Compile
from nsa_port.emulator.registers import Reader, Step, Waves

SCRATCH_MARK = 0x5C5C
"""Upper half of the address in the descriptor of scratch memory (gfx90a), as `machine` sets it."""

LOADS: Mapping[str, Access] = {
    "dword": access(32),
    "dwordx2": access(64),
    "dwordx3": access(96),
    "dwordx4": access(128),
    **{f"b{width}": access(width) for width in (32, 64, 96, 128)},
    "ubyte": access(8),
    "u8": access(8),
    "ushort": access(16),
    "u16": access(16),
    "sbyte": access(8, signed=True),
    "i8": access(8, signed=True),
    "sshort": access(16, signed=True),
    "i16": access(16, signed=True),
    **{
        name: access(width, signed=signed, half=True, high=high)
        for suffix, infix, high in (("_d16", "d16_", False), ("_d16_hi", "d16_hi_", True))
        for name, width, signed in (
            *((f"ubyte{suffix}", 8, False), (f"{infix}u8", 8, False)),
            *((f"sbyte{suffix}", 8, True), (f"{infix}i8", 8, True)),
            *((f"short{suffix}", 16, False), (f"{infix}b16", 16, False)),
        )
    },
}
STORES: Mapping[str, Access] = {
    "dword": access(32),
    "dwordx2": access(64),
    "dwordx3": access(96),
    "dwordx4": access(128),
    **{f"b{width}": access(width) for width in (8, 16, 32, 64, 96, 128)},
    "byte": access(8),
    "short": access(16),
    "byte_d16_hi": access(8, high=True),
    "short_d16_hi": access(16, high=True),
    "d16_hi_b8": access(8, high=True),
    "d16_hi_b16": access(16, high=True),
}
SEGMENTS = ("global", "flat", "buffer", "scratch")


@dataclass(frozen=True, slots=True)
class Place:
    """Where the lanes access: positions in `content` [count, lanes]; enabled None means all."""

    content: Array
    positions: Array
    enabled: Array | None


Locate = Callable[[Waves, int], Place]
"""Gives the place of an access of so many bytes per lane."""


# ------------------------------------------------------------------------------------- addresses
def _in_global_memory(
    waves: Waves, addresses: Array, enabled: Array | None, size: int, instruction: Instruction
) -> Place:
    """Check addresses [count, lanes], and tell those who watch the traffic."""
    positions = waves.memory.locate(addresses, size, enabled, instruction.name)
    is_atomic, is_load = "_atomic_" in instruction.name, "_load_" in instruction.name
    used = positions.reshape(-1) if enabled is None else positions[enabled]
    if not is_load:
        waves.memory.mark_written(used)
    if waves.races is not None and not is_atomic:
        workgroups = np.broadcast_to(waves.workgroup[waves.chosen][:, None], waves.shape)
        workgroups = workgroups.reshape(-1) if enabled is None else workgroups[enabled]
        note = waves.races.load if is_load else waves.races.store
        note(used, workgroups, size)
    if waves.traffic is not None:
        mask = waves.whole(np.array([[True]])) if enabled is None else enabled
        waves.traffic.global_access(positions, mask, size, stores=not is_load)
    return Place(waves.memory.content, positions, enabled)


def _in_scratch(waves: Waves, offsets: Array, size: int, instruction: Instruction) -> Place:
    """Check offsets into each lane's scratch memory."""
    enabled = None if waves.all_active else waves.active_lanes
    wrong = (offsets < 0) | (offsets + size > waves.scratch_bytes)
    if enabled is not None:
        wrong = waves.whole(wrong) & enabled
    if wrong.any():
        raise OutOfBounds(
            f"out of bounds: {instruction.name} of {size} bytes at scratch offset "
            f"{int(offsets.max())} of {waves.scratch_bytes}"
        )
    positions = waves.scratch_base() + offsets
    return Place(
        waves.scratch, positions if enabled is None else np.where(enabled, positions, 0), enabled
    )


def _zero(waves: Waves) -> Array:
    return np.zeros((1, 1), uint32)


def _optional(operand: Operand) -> Reader:
    """A 32-bit offset that may be `off`."""
    if operand.kind == "vector":
        return read_vector(operand)
    if operand.kind == "none":
        return _zero
    read = read_scalar(operand)
    return lambda waves: read(waves)[:, None]


def locate_global(instruction: Instruction, address: Operand, base: Operand) -> Locate:
    """global_* and flat_*: a 64-bit address per lane, or a scalar base and a 32-bit offset."""
    immediate = np.array(instruction.number("offset"), int64).view(uint64)
    if base.kind == "scalar":
        read_base, read_offset = read_wide_scalar(base), _optional(address)
    else:
        read_address = read_vector(address, "u64")

    def addresses(waves: Waves) -> Array:
        if base.kind == "scalar":
            return read_base(waves)[:, None] + read_offset(waves).astype(uint64) + immediate
        return read_address(waves) + immediate

    def locate(waves: Waves, size: int) -> Place:
        enabled = None if waves.all_active else waves.active_lanes
        return _in_global_memory(waves, waves.whole(addresses(waves)), enabled, size, instruction)

    return locate


def locate_scratch(instruction: Instruction, address: Operand, base: Operand) -> Locate:
    """scratch_*: an offset into each lane's own memory."""
    read_address, read_base = _optional(address), _optional(base)
    immediate = instruction.number("offset")

    def locate(waves: Waves, size: int) -> Place:
        offsets = read_address(waves).astype(int64) + read_base(waves).astype(int64) + immediate
        return _in_scratch(waves, offsets, size, instruction)

    return locate


def locate_buffer(
    instruction: Instruction, address: Operand, descriptor: Operand, offset: Operand
) -> Locate:
    """buffer_*: an offset into what a descriptor describes; beyond its end nothing happens."""
    first, immediate = descriptor.register, instruction.number("offset")
    in_use = address if "offen" in instruction.modifiers else NONE
    read_address, read_offset = _optional(in_use), read_scalar(offset)

    def locate(waves: Waves, size: int) -> Place:
        low, high, records = (waves.scalar[first + word, waves.chosen] for word in range(3))
        high = high & uint32(0xFFFF)
        offsets = read_address(waves).astype(uint64) + uint64(immediate)
        scalar_offset = read_offset(waves)[:, None]
        if (high == SCRATCH_MARK).all():
            # The scalar offset counts bytes of a whole wave here.
            within = offsets.view(int64) + scalar_offset.astype(int64) // waves.lanes
            return _in_scratch(waves, within, size, instruction)
        inside = offsets + uint64(size) <= records.astype(uint64)[:, None]
        enabled = waves.whole(inside) & waves.active_lanes
        base = low.astype(uint64) | (high.astype(uint64) << uint64(32))
        addresses = waves.whole(base[:, None] + offsets + scalar_offset.astype(uint64))
        return _in_global_memory(waves, addresses, enabled, size, instruction)

    return locate


def locate(instruction: Instruction, places: list[Operand]) -> Locate:
    """The address operands of any segment: what an instruction has beside its data."""
    segment = instruction.name.partition("_")[0]
    if segment == "buffer":
        if len(places) == 2:  # without a vector address the operand may be left out
            places = [NONE, *places]
        return locate_buffer(instruction, *places)
    address, base = (*places, NONE)[:2]
    if segment == "scratch":
        return locate_scratch(instruction, address, base)
    return locate_global(instruction, address, base)


# ---------------------------------------------------------------------------------- instructions
def _size_name(instruction: Instruction) -> str:
    """`global_load_lds_dwordx4` -> `dwordx4`."""
    return instruction.name.split("_", 2)[2].removeprefix("lds_")


def compile_load(instruction: Instruction, architecture: Architecture) -> Step:
    """Any load into registers; lanes beyond a descriptor's end get 0."""
    if "lds" in instruction.modifiers or "_load_lds_" in instruction.name:
        return compile_load_to_lds(instruction, architecture)
    form = LOADS[_size_name(instruction)]
    destination, *places = instruction.operands
    find = locate(instruction, places)
    writers = [write_vector(destination.at(word)) for word in range(max(1, form.words))]
    half = form.half or destination.high is not None
    high = form.high or bool(destination.high)

    def step(waves: Waves) -> None:
        place = find(waves, form.bytes)
        if form.words:
            values = gather(place.content, place.positions, form.words)
        else:
            values = [read_narrow(place.content, place.positions, form)]
        if place.enabled is not None:
            values = [np.where(place.enabled, value, uint32(0)) for value in values]
        if half:
            old = waves.vector[destination.register, waves.chosen]
            values = [place_narrow(values[0], old, half, high)]
        for write, value in zip(writers, values, strict=True):
            write(waves, value)

    return step


def compile_store(instruction: Instruction, architecture: Architecture) -> Step:
    """Any store of registers; of lanes that store to one place, the highest wins."""
    form = STORES[_size_name(instruction)]
    if instruction.name.startswith("buffer"):
        source, *places = instruction.operands
    else:
        address, source, *base = instruction.operands
        places = [address, *base]
    find = locate(instruction, places)
    readers = [read_vector(source.at(word)) for word in range(max(1, form.words))]
    shift = uint32(16 if form.high or source.high else 0)

    def step(waves: Waves) -> None:
        place = find(waves, form.bytes)
        chosen = np.ones(waves.shape, bool) if place.enabled is None else place.enabled
        positions = place.positions[chosen]
        values = [waves.whole(read(waves))[chosen] for read in readers]
        if form.words:
            scatter(place.content, positions, values)
        else:
            write_narrow(place.content, positions, values[0] >> shift, form.bytes)

    return step


def compile_load_to_lds(instruction: Instruction, architecture: Architecture) -> Step:
    """Loads that go to the LDS: lane n writes behind lane n - 1, from the address in m0 on."""
    form = LOADS[_size_name(instruction)]
    find = locate(instruction, list(instruction.operands))
    start, immediate = architecture.memory_scalar, instruction.number("offset")
    lane = np.arange(architecture.lanes) * form.bytes

    def step(waves: Waves) -> None:
        place = find(waves, form.bytes)
        first = (waves.scalar[start, waves.chosen] & uint32(0x3FFFF)).astype(int64) + immediate
        targets = first[:, None] + lane
        active = waves.active_lanes
        if ((targets + form.bytes > waves.lds_bytes) & active).any():
            raise OutOfBounds(f"out of bounds: {instruction.name} past the end of the LDS")
        values = gather(place.content, place.positions, form.words)
        if place.enabled is not None:
            values = [np.where(place.enabled, value, uint32(0)) for value in values]
        positions = (targets + waves.lds_base())[active]
        scatter(waves.lds, positions, [value[active] for value in values])

    return step


TABLE: Mapping[str, Compile] = {
    **{f"{segment}_load_{size}": compile_load for segment in SEGMENTS for size in LOADS},
    **{
        f"{segment}_load_lds_{size}": compile_load_to_lds
        for segment in ("global", "buffer")
        for size in ("dword", "dwordx3", "dwordx4", "b32", "b96", "b128")
    },
    **{f"{segment}_store_{size}": compile_store for segment in SEGMENTS for size in STORES},
}
