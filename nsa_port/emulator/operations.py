"""How an arithmetic instruction is written down: one line of a table.

    **define("f32 <- f32 f32", add_f32=np.add)

says that `add_f32` reads two operands as float32 and writes what the function gives as float32.
Functions take and return whole arrays; the kinds are those of `number_formats`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from nsa_port.emulator.architectures import Architecture
from nsa_port.emulator.assembly import Instruction
from nsa_port.emulator.registers import Step

Compile = Callable[[Instruction, Architecture], Step]
"""Makes one instruction ready to run; the tables of every instruction class map names to these."""


@dataclass(frozen=True, slots=True)
class Operation:
    """A line of a table. accumulates: the destination is the last source too."""

    result: str
    sources: tuple[str, ...]
    function: Callable[..., Any]
    accumulates: bool = False


def define(
    signature: str, *, accumulates: bool = False, **functions: Callable[..., Any]
) -> Mapping[str, Operation]:
    """Table lines for operations that share a signature such as `u32 <- u32 u32`."""
    result, _, sources = signature.partition(" <- ")
    return {
        name: Operation(result, tuple(sources.split()), function, accumulates)
        for name, function in functions.items()
    }
