"""Vector arithmetic that reads or writes a mask of lanes too: carries, the steps of a division."""

from __future__ import annotations

import re
from collections.abc import Mapping

import numpy as np
from numpy import int64, uint32, uint64

from nsa_port.emulator.architectures import Architecture
from nsa_port.emulator.assembly import VCC, Instruction, Operand
from nsa_port.emulator.floating import (
    exponent_field,
    fused_multiply_add,
    load_exponent,
    scale_for_division,
)
from nsa_port.emulator.operands import read_lane_mask, read_vector, write_lane_mask, write_vector
from nsa_port.emulator.operations import Compile
from nsa_port.emulator.registers import Step, Waves

_VCC_PAIR = Operand("scalar", VCC, 2)


# ---------------------------------------------------------------------------------------- carries
def compile_carry(instruction: Instruction, architecture: Architecture) -> Step:
    """v_add_co_u32, v_subb_co_u32 and their like: 32-bit sums with a carry out, and perhaps in."""
    match = re.match(r"v_(addc|add|subbrev|subrev|subb|sub)(_co)?(_ci)?_u32$", instruction.name)
    assert match is not None
    operation, with_carry_in = match.group(1), match.group(3) is not None
    with_carry_in = with_carry_in or operation in ("addc", "subb", "subbrev")
    destination, carry_out, *sources = instruction.operands
    left, right = read_vector(sources[0]), read_vector(sources[1])
    if "rev" in operation:
        left, right = right, left
    carry_in = sources[2] if len(sources) > 2 else _VCC_PAIR
    read_carry = read_lane_mask(carry_in, architecture) if with_carry_in else None
    write = write_vector(destination)
    write_carry = write_lane_mask(carry_out, architecture)
    sign = 1 if operation.startswith("add") else -1

    def step(waves: Waves) -> None:
        exact = left(waves).astype(int64) + sign * right(waves).astype(int64)
        if read_carry is not None:
            exact = exact + sign * read_carry(waves).astype(int64)
        write(waves, exact.astype(uint64).astype(uint32))
        write_carry(waves, (exact < 0) | (exact > 0xFFFFFFFF))

    return step


def compile_wide_multiply_add(instruction: Instruction, architecture: Architecture) -> Step:
    """v_mad_u64_u32, v_mad_i64_i32 (gfx12: v_mad_co_*): a 64-bit sum of a 32 x 32 bit product."""
    kind, wide = ("i32", int64) if "i64" in instruction.name else ("u32", uint64)
    destination, carry_out, *sources = instruction.operands
    left, right = read_vector(sources[0], kind), read_vector(sources[1], kind)
    addend = read_vector(sources[2], "u64")
    write = write_vector(destination, "u64")
    write_carry = write_lane_mask(carry_out, architecture)

    def step(waves: Waves) -> None:
        product = (left(waves).astype(wide) * right(waves).astype(wide)).view(uint64)
        added = addend(waves)
        total = product + added
        write(waves, total)
        write_carry(waves, total < added)

    return step


# --------------------------------------------------------------------------------------- division
def compile_division_scale(instruction: Instruction, architecture: Architecture) -> Step:
    """v_div_scale_f32."""
    destination, flag, *sources = instruction.operands
    value, divisor, dividend = (read_vector(source, "f32") for source in sources)
    write = write_vector(destination, "f32")
    write_flag = write_lane_mask(flag, architecture)

    def step(waves: Waves) -> None:
        scaled, flagged = scale_for_division(value(waves), divisor(waves), dividend(waves))
        write(waves, waves.whole(scaled))
        write_flag(waves, flagged)

    return step


def compile_division_step(instruction: Instruction, architecture: Architecture) -> Step:
    """v_div_fmas_f32: a fused multiply-add that undoes the scaling where VCC says so."""
    destination, *sources = instruction.operands
    first, second, third = (read_vector(source, "f32") for source in sources)
    scaled_back, write = read_lane_mask(_VCC_PAIR, architecture), write_vector(destination, "f32")

    def step(waves: Waves) -> None:
        addend = third(waves)
        value = fused_multiply_add(first(waves), second(waves), addend)
        shift = np.where(exponent_field(addend) > 127, 64, -64)
        write(waves, np.where(scaled_back(waves), load_exponent(value, shift), value))

    return step


_CARRIES = (
    *("add_co_u32", "sub_co_u32", "subrev_co_u32"),  # CDNA and RDNA
    *("addc_co_u32", "subb_co_u32", "subbrev_co_u32"),  # CDNA
    *("add_co_ci_u32", "sub_co_ci_u32", "subrev_co_ci_u32"),  # RDNA
)
TABLE: Mapping[str, Compile] = {
    **{f"v_{name}": compile_carry for name in _CARRIES},
    "v_mad_u64_u32": compile_wide_multiply_add,
    "v_mad_i64_i32": compile_wide_multiply_add,
    "v_mad_co_u64_u32": compile_wide_multiply_add,
    "v_mad_co_i64_i32": compile_wide_multiply_add,
    "v_div_scale_f32": compile_division_scale,
    "v_div_fmas_f32": compile_division_step,
}
