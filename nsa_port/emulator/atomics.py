"""Atomic operations on global memory and on the LDS.

Lanes that meet at one address are served in the order of waves and lanes, so that results are
reproducible; the hardware promises no order.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy import float16, uint16, uint32

from nsa_port.emulator.architectures import Architecture
from nsa_port.emulator.assembly import Instruction
from nsa_port.emulator.local_data_share import lds_positions
from nsa_port.emulator.number_formats import (
    KINDS,
    Array,
    bfloat16_of_float32,
    float32_of_bfloat16,
    pack_halves,
)
from nsa_port.emulator.operands import read_vector, write_vector
from nsa_port.emulator.operations import Compile
from nsa_port.emulator.registers import Step, Waves
from nsa_port.emulator.vector_memory import locate


@dataclass(frozen=True, slots=True)
class Atomic:
    """kind: what lies in memory. function: (old, operand[, compared]) -> new."""

    kind: str
    function: Callable[..., Array]
    compares: bool = False


def _halves(words: Array) -> tuple[Array, Array]:
    return words.astype(uint16), (words >> uint32(16)).astype(uint16)


def _add_float16_pairs(old: Array, operand: Array) -> Array:
    sums = [
        left.view(float16) + right.view(float16)
        for left, right in zip(_halves(old), _halves(operand), strict=True)
    ]
    return pack_halves(*sums)


def _add_bfloat16_pairs(old: Array, operand: Array) -> Array:
    sums = [
        bfloat16_of_float32(float32_of_bfloat16(left) + float32_of_bfloat16(right))
        for left, right in zip(_halves(old), _halves(operand), strict=True)
    ]
    return pack_halves(*sums)


def _swap(old: Array, operand: Array) -> Array:
    return operand


def _swap_if_equal(old: Array, operand: Array, compared: Array) -> Array:
    return np.where(old == compared, operand, old)


_INTEGERS: Mapping[str, Callable[..., Array]] = {
    "add": np.add,
    "sub": np.subtract,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "swap": _swap,
}
ATOMICS: Mapping[str, Atomic] = {
    # CDNA: the width is a suffix, the sign a prefix
    **{name: Atomic("u32", function) for name, function in _INTEGERS.items()},
    **{f"{name}_x2": Atomic("u64", function) for name, function in _INTEGERS.items()},
    **{
        f"{sign}{name}{suffix}": Atomic(f"{'i' if sign == 's' else 'u'}{width}", function)
        for sign in "su"
        for name, function in (("min", np.minimum), ("max", np.maximum))
        for suffix, width in (("", 32), ("_x2", 64))
    },
    "cmpswap": Atomic("u32", _swap_if_equal, compares=True),
    "cmpswap_x2": Atomic("u64", _swap_if_equal, compares=True),
    # RDNA and the LDS: the type is a suffix
    **{
        f"{name}_{letter}{width}": Atomic(f"u{width}", function)
        for name, function in _INTEGERS.items()
        for letter in "ub"
        for width in (32, 64)
    },
    **{
        f"{name}_{sign}{width}": Atomic(f"{sign}{width}", function)
        for name, function in (("min", np.minimum), ("max", np.maximum))
        for sign in "iu"
        for width in (32, 64)
    },
    "cmpswap_b32": Atomic("u32", _swap_if_equal, compares=True),
    "cmpswap_b64": Atomic("u64", _swap_if_equal, compares=True),
    # Floating point
    **{f"add_{kind}": Atomic(kind, np.add) for kind in ("f32", "f64")},
    **{
        f"{name}{infix}_{kind}": Atomic(kind, function)
        for name, function in (("min", np.fmin), ("max", np.fmax))
        for infix in ("", "_num")
        for kind in ("f32", "f64")
    },
    "pk_add_f16": Atomic("u32", _add_float16_pairs),
    "pk_add_bf16": Atomic("u32", _add_bfloat16_pairs),
}


def apply_atomic(
    content: Array, positions: Array, operands: list[Array], atomic: Atomic, wants_old: bool
) -> Array:
    """Do one atomic for each position (1-D, in order); returns what each found there."""
    dtype = np.dtype(KINDS[atomic.kind].dtype)
    view, index = content.view(dtype), positions // dtype.itemsize
    if len(np.unique(index)) == len(index):
        old = view[index]
        view[index] = atomic.function(old, *operands)
        return old
    if isinstance(atomic.function, np.ufunc) and not wants_old:
        atomic.function.at(view, index, operands[0])
        return operands[0]
    old = np.empty(len(index), dtype)
    for lane, place in enumerate(index):
        old[lane] = view[place]
        arguments = [operand[lane : lane + 1] for operand in operands]
        view[place] = atomic.function(old[lane : lane + 1], *arguments)[0]
    return old


def _wants_old(instruction: Instruction) -> bool:
    """Whether an atomic on global memory returns what it found."""
    modifiers = instruction.modifiers
    return "sc0" in modifiers or "glc" in modifiers or "RETURN" in str(modifiers.get("th", ""))


def compile_global_atomic(instruction: Instruction, architecture: Architecture) -> Step:
    """global_atomic_*, flat_atomic_*, buffer_atomic_*."""
    atomic = ATOMICS[instruction.name.split("_", 2)[2]]
    form, wants_old = KINDS[atomic.kind], _wants_old(instruction)
    operands = list(instruction.operands)
    if instruction.name.startswith("buffer"):
        data, *places = operands
        destination = data
    else:
        destination = operands.pop(0) if wants_old else operands[1]
        address, data, *base = operands
        places = [address, *base]
    find = locate(instruction, places)
    readers = [read_vector(data.at(0), atomic.kind)]
    if atomic.compares:
        readers.append(read_vector(data.at(form.registers), atomic.kind))
    write = write_vector(destination.at(0), atomic.kind)
    size = 4 * form.registers

    def step(waves: Waves) -> None:
        place = find(waves, size)
        enabled = np.ones(waves.shape, bool) if place.enabled is None else place.enabled
        values = [waves.whole(read(waves))[enabled] for read in readers]
        old = apply_atomic(place.content, place.positions[enabled], values, atomic, wants_old)
        if wants_old:
            result: Array = np.zeros(waves.shape, form.dtype)
            result[enabled] = old
            write(waves, result)

    return step


def compile_lds_atomic(instruction: Instruction, architecture: Architecture) -> Step:
    """ds_add_u32, ds_max_rtn_f32 and their like."""
    name = instruction.name.removeprefix("ds_")
    wants_old = "_rtn_" in name
    atomic = ATOMICS[name.replace("_rtn_", "_")]
    form = KINDS[atomic.kind]
    operands = list(instruction.operands)
    write = write_vector(operands.pop(0), atomic.kind) if wants_old else None
    read_address, read_value = read_vector(operands[0]), read_vector(operands[1], atomic.kind)
    offset, size = uint32(instruction.number("offset")), 4 * form.registers

    def step(waves: Waves) -> None:
        positions = lds_positions(waves, read_address(waves) + offset, size, instruction)
        active = waves.active_lanes
        values = [waves.whole(read_value(waves))[active]]
        old = apply_atomic(waves.lds, positions[active], values, atomic, wants_old)
        if write is not None:
            result: Array = np.zeros(waves.shape, form.dtype)
            result[active] = old
            write(waves, result)

    return step


def _returning(name: str) -> str:
    """`max_f32` -> `max_rtn_f32`."""
    operation, _, kind = name.rpartition("_")
    return f"{operation}_rtn_{kind}"


TABLE: Mapping[str, Compile] = {
    **{
        f"{segment}_atomic_{name}": compile_global_atomic
        for segment in ("global", "flat", "buffer")
        for name in ATOMICS
    },
    **{
        f"ds_{form}": compile_lds_atomic
        for name, atomic in ATOMICS.items()
        if not atomic.compares and "_" in name and not name.endswith("_x2")
        for form in (name, _returning(name))
    },
}
