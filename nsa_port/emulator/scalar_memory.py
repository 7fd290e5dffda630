"""Scalar loads: from the argument buffer, and from addresses that a whole wave shares."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy import int8, int16, int32, int64, uint8, uint16, uint32, uint64

from nsa_port.emulator.architectures import Architecture
from nsa_port.emulator.assembly import Instruction
from nsa_port.emulator.memory import gather
from nsa_port.emulator.number_formats import Array
from nsa_port.emulator.operands import read_scalar, read_wide_scalar
from nsa_port.emulator.operations import Compile
from nsa_port.emulator.registers import Step, Waves

WORDS: Mapping[str, int] = {
    "dword": 1,
    "dwordx2": 2,
    "dwordx3": 3,
    "dwordx4": 4,
    "dwordx8": 8,
    "dwordx16": 16,
    "b32": 1,
    "b64": 2,
    "b96": 3,
    "b128": 4,
    "b256": 8,
    "b512": 16,
}
"""Registers that a scalar load fills, by the end of its name."""
NARROW: Mapping[str, tuple[type, type]] = {
    "u8": (uint8, uint32),
    "i8": (int8, int32),
    "u16": (uint16, uint32),
    "i16": (int16, int32),
}
_BUFFER_ADDRESS = uint64(0xFFFFFFFFFFFF)
_DWORD = ~uint64(3)


def compile_load(instruction: Instruction, architecture: Architecture) -> Step:
    """s_load_dword and its like; s_buffer_load_* checks the bounds of its descriptor as well."""
    destination, base, offset = instruction.operands
    register, size = destination.register, instruction.name.rpartition("_")[2]
    read_base, read_offset = read_wide_scalar(base), read_scalar(offset)
    immediate = instruction.number("offset")
    if offset.kind == "constant":  # an immediate is signed, a register is not
        assert isinstance(offset.value, int)
        immediate, read_offset = immediate + offset.value, lambda waves: np.zeros(1, uint32)
    dtype, wide = NARROW.get(size, (uint32, uint32))
    words = WORDS.get(size, 0)
    bytes_ = 4 * words if words else np.dtype(dtype).itemsize

    def locate(waves: Waves) -> Array:
        start = read_base(waves) & _BUFFER_ADDRESS
        moved = read_offset(waves).astype(int64) + immediate
        addresses = start + moved.view(uint64)
        if words:
            addresses = addresses & _DWORD
        addresses = np.broadcast_to(addresses, (waves.count,))
        return waves.memory.locate(addresses[:, None], bytes_, None, instruction.name)[:, 0]

    def step(waves: Waves) -> None:
        positions = locate(waves)
        if waves.races is not None:
            waves.races.load(positions, waves.workgroup[waves.chosen], bytes_)
        if not words:
            view = waves.memory.view(dtype)
            values = view[positions // bytes_].astype(wide).view(uint32)
            waves.scalar[register, waves.chosen] = values
            return
        for first in range(0, words, 4):
            loaded = gather(waves.memory.content, positions + 4 * first, min(4, words - first))
            for word, values in enumerate(loaded):
                waves.scalar[register + first + word, waves.chosen] = values

    return step


TABLE: Mapping[str, Compile] = {
    f"s_{form}_{size}": compile_load
    for form in ("load", "buffer_load")
    for size in (*WORDS, *NARROW)
}
