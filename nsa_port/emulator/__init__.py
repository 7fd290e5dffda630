"""Emulated AMD GPUs: runs the assembly that Triton compiles for one, on a CPU, with numpy.

    from nsa_port import emulator

    with emulator.emulated("gfx942") as session:
        kernel[grid](cpu_tensors, ...)          # any Triton kernel, forward or backward
    print(session.launches[-1].counters.instructions)

What runs is the text of `kernel.asm["amdgcn"]`, the very text that Triton assembles into the code
object, for the GPUs of `architectures.ARCHITECTURES`. Registers and the local data share start as
NaN, every access is checked against the buffers of the arguments, data races between workgroups are
reported, and an instruction that is not known is named together with the line to add.

It is a functional model. A pass does not prove speed, waits and latencies, races within a
workgroup, the memory model, the last bit of a result (exp, log, rcp and sqrt are exact here, 1 ulp
on the hardware), errata, or the HIP runtime.

Reading order: `assembly` (text to instructions), `registers` and `memory` (what they work on),
`operands` (how they reach it), one module per instruction class, `decoder` (which one is which),
`machine` (running them), `driver` (Triton), `report` (what a launch cost).

Nothing else in nsa_port imports this package unless asked; it needs numpy, and the driver Triton
(`pip install nsa-port[emulate]`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from nsa_port.emulator.architectures import ARCHITECTURES
from nsa_port.emulator.errors import (
    DataRace,
    EmulatorError,
    NoProgress,
    OutOfBounds,
    Trap,
    UnknownInstruction,
)

if TYPE_CHECKING:
    from nsa_port.emulator.driver import (
        Launch,
        Session,
        activate,
        deactivate,
        emulated,
        using,
    )

__all__ = [
    "ARCHITECTURES",
    "DataRace",
    "EmulatorError",
    "Launch",
    "NoProgress",
    "OutOfBounds",
    "Session",
    "Trap",
    "UnknownInstruction",
    "activate",
    "deactivate",
    "emulated",
    "using",
]

_FROM_DRIVER = ("Launch", "Session", "activate", "deactivate", "emulated", "using")


def __getattr__(name: str) -> object:
    """The driver's names, which need Triton, on first use."""
    if name in _FROM_DRIVER:
        from nsa_port.emulator import driver

        return getattr(driver, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
