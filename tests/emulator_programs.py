"""Tiny assembly programs for the emulator: registers in, registers out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from nsa_port.emulator.architectures import ARCHITECTURES
from nsa_port.emulator.assembly import EXEC, VCC, Program
from nsa_port.emulator.counters import Counters
from nsa_port.emulator.errors import EmulatorError
from nsa_port.emulator.machine import Run
from nsa_port.emulator.memory import GlobalMemory
from nsa_port.emulator.races import RaceDetector
from nsa_port.emulator.registers import Waves

CDNA, RDNA = ("gfx90a", "gfx942", "gfx950"), ("gfx1100", "gfx1201")
FIRST_POINTER = 40
"""The scalar register that holds the address of the first buffer; the next pair the second's."""


def program(architecture: str, body: str, descriptor: str = "") -> Program:
    """A program of these lines, which ends at the last one."""
    return Program.parse(
        f'.amdgcn_target "amdgcn-amd-amdhsa--{architecture}"\n.text\nkernel:\n{body}\n'
        f"s_endpgm\n.section .rodata\n.amdhsa_kernel kernel\n{descriptor}\n"
    )


def mask(lanes: Sequence[int]) -> int:
    """The mask of these lanes."""
    return sum(1 << lane for lane in lanes)


@dataclass
class Result:
    """What a program left behind."""

    waves: Waves
    memory: GlobalMemory
    addresses: list[int]
    counters: Counters

    def vector(self, register: int, dtype: Any = np.uint32, wave: int = 0) -> np.ndarray:
        """The lanes of one vector register."""
        return self.waves.vector[register, wave].view(dtype)

    def wide_vector(self, register: int, dtype: Any = np.uint64) -> np.ndarray:
        """The lanes of a pair of vector registers."""
        low, high = (self.vector(register + n).astype(np.uint64) for n in (0, 1))
        return (low | high << np.uint64(32)).view(dtype)

    def scalar(self, register: int, wave: int = 0) -> int:
        return int(self.waves.scalar[register, wave])

    def wide_scalar(self, register: int, wave: int = 0) -> int:
        return self.scalar(register, wave) | self.scalar(register + 1, wave) << 32

    @property
    def carry(self) -> bool:
        return bool(self.waves.carry[0])

    def lanes(self, register: int = VCC) -> np.ndarray:
        """A mask in scalar registers as bool [lane]."""
        bits = self.wide_scalar(register) if self.waves.lanes == 64 else self.scalar(register)
        return np.array([(bits >> lane) & 1 for lane in range(self.waves.lanes)], bool)

    def lds(self, dtype: Any = np.uint32) -> np.ndarray:
        return self.waves.lds.view(dtype)

    def buffer(self, number: int, dtype: Any) -> np.ndarray:
        return self.memory.contents(self.addresses[number]).view(dtype)


def execute(
    architecture: str,
    body: str,
    *,
    vectors: Mapping[int, Any] | None = None,
    scalars: Mapping[int, int] | None = None,
    carry: bool = False,
    active: Sequence[int] | None = None,
    buffers: Sequence[np.ndarray] = (),
    lds: np.ndarray | None = None,
    scratch_bytes: int = 0,
    workgroups: int = 1,
    waves_per_workgroup: int = 1,
    races: bool = False,
    most_steps: int = 100_000,
) -> Result:
    """Run a program with registers, buffers and LDS as given; only `active` lanes take part.

    vectors: by register, arrays of 4 or 8 bytes per lane. scalars: by register, up to 64 bits.
    """
    memory = GlobalMemory()
    addresses = [
        memory.add(np.ascontiguousarray(buffer).reshape(-1).view(np.uint8).copy(), f"buffer {n}")
        for n, buffer in enumerate(buffers)
    ] or [memory.add(np.zeros(16, np.uint8), "nothing")]
    memory.seal()
    waves = Waves(
        ARCHITECTURES[architecture],
        memory,
        workgroups=np.arange(workgroups),
        waves_per_workgroup=waves_per_workgroup,
        vector_registers=320,
        lds_bytes=0 if lds is None else lds.nbytes,
        scratch_bytes=scratch_bytes,
    )
    for register, values in (vectors or {}).items():
        raw = np.ascontiguousarray(np.broadcast_to(values, (waves.lanes,)))
        words = raw.view(np.uint32).reshape(waves.lanes, -1)
        for word in range(words.shape[1]):
            waves.vector[register + word] = words[:, word]
    pointers = {FIRST_POINTER + 2 * n: address for n, address in enumerate(addresses)}
    for register, value in {**pointers, **(scalars or {})}.items():
        waves.scalar[register] = value & 0xFFFFFFFF
        if value > 0xFFFFFFFF or register in pointers:
            waves.scalar[register + 1] = value >> 32
    waves.carry[:] = carry
    if lds is not None:
        waves.lds.reshape(workgroups, -1)[:, : lds.nbytes] = lds.view(np.uint8)
    if active is not None:
        bits = mask(active)
        waves.scalar[EXEC], waves.scalar[EXEC + 1] = bits & 0xFFFFFFFF, bits >> 32
        waves.exec_changed()
    waves.races = RaceDetector(memory) if races else None
    parsed = program(architecture, body)
    counters = Counters([0] * len(parsed.instructions))
    with np.errstate(all="ignore"):
        Run(parsed, waves, counters, most_steps).finish()
    return Result(waves, memory, addresses, counters)


def refuses(error: type[EmulatorError], *parts: str) -> Any:
    """`pytest.raises` for an error whose message holds every part."""
    pattern = "".join(f"(?=.*{part})" for part in parts)
    return pytest.raises(error, match=f"(?s){pattern}")


def same(found: np.ndarray, expected: np.ndarray) -> None:
    """Equal in every bit, any NaN for any NaN."""
    np.testing.assert_array_equal(found, expected)


def lanes_of(architecture: str) -> int:
    return ARCHITECTURES[architecture].lanes
