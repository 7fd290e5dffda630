"""The registers of the waves that are stepped together, and which waves the next step is for.

Registers and the local data share start as a quiet NaN, so that a kernel that reads what it never
wrote shows it.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy import int64, uint8, uint32, uint64

from nsa_port.emulator.architectures import Architecture
from nsa_port.emulator.assembly import EXEC
from nsa_port.emulator.bits import lanes_of_mask
from nsa_port.emulator.counters import Traffic
from nsa_port.emulator.memory import GlobalMemory
from nsa_port.emulator.number_formats import Array
from nsa_port.emulator.races import RaceDetector

GARBAGE = 0x7FC0DEAD
"""What registers and LDS hold before they are written: a NaN as float32, and in its upper half."""
SCALAR_REGISTERS = 128


class Waves:
    """All waves of some workgroups, side by side.

    vector: uint32 [register, wave, lane]; scalar: uint32 [register, wave]; carry: bool [wave], the
    SCC bit; active: bool [wave, lane], the EXEC mask spelled out. `chosen` are the waves that the
    current step is for (a slice, or their numbers), `count` how many, and `all_active` says that
    all their lanes are active.
    """

    def __init__(
        self,
        architecture: Architecture,
        memory: GlobalMemory,
        *,
        workgroups: Array,
        waves_per_workgroup: int,
        vector_registers: int,
        lds_bytes: int,
        scratch_bytes: int,
    ) -> None:
        lanes, total = architecture.lanes, len(workgroups) * waves_per_workgroup
        self.architecture = architecture
        self.memory = memory
        self.lanes = lanes
        self.total = total
        self.vector = np.full((vector_registers, total, lanes), GARBAGE, uint32)
        self.scalar = np.full((SCALAR_REGISTERS, total), GARBAGE, uint32)
        self.carry = np.zeros(total, bool)
        self.active = np.ones((total, lanes), bool)
        self._whole = np.ones(total, bool)
        self.wave_in_workgroup = np.tile(np.arange(waves_per_workgroup), len(workgroups))
        self.slot = np.repeat(np.arange(len(workgroups)), waves_per_workgroup)
        self.workgroup = workgroups[self.slot]
        self.lds_bytes = lds_bytes
        self.lds_stride = -(-max(lds_bytes, 16) // 16) * 16
        self.lds = np.full(len(workgroups) * self.lds_stride // 4, GARBAGE, uint32).view(uint8)
        self.scratch_bytes = scratch_bytes
        self.scratch_stride = -(-max(scratch_bytes, 16) // 16) * 16
        scratch_words = total * lanes * self.scratch_stride // 4 if scratch_bytes else 4
        self.scratch = np.full(scratch_words, GARBAGE, uint32).view(uint8)
        self.races: RaceDetector | None = None
        self.traffic: Traffic | None = None
        self.scalar[EXEC] = 0xFFFFFFFF
        self.scalar[EXEC + 1] = 0xFFFFFFFF if lanes == 64 else 0
        self.chosen: slice | Array = slice(0, total)
        self.count = total
        self.all_active = True

    def choose(self, waves: Array) -> None:
        """Make the next steps be for these waves (bool [wave])."""
        numbers = np.flatnonzero(waves)
        self.count = len(numbers)
        first, last = int(numbers[0]), int(numbers[-1])
        self.chosen = slice(first, last + 1) if last - first + 1 == self.count else numbers
        self.all_active = bool(self._whole[self.chosen].all())

    @property
    def active_lanes(self) -> Array:
        """bool [count, lanes]: which lanes of the chosen waves are active."""
        return self.active[self.chosen]

    @property
    def shape(self) -> tuple[int, int]:
        """(chosen waves, lanes)."""
        return self.count, self.lanes

    def whole(self, values: Array) -> Array:
        """Repeat a uniform operand for every chosen wave and lane."""
        return values if values.shape == self.shape else np.broadcast_to(values, self.shape)

    def lds_base(self) -> Array:
        """int64 [count, 1]: where the LDS of each chosen wave's workgroup starts."""
        return (self.slot[self.chosen].astype(int64) * self.lds_stride)[:, None]

    def scratch_base(self) -> Array:
        """int64 [count, lanes]: where the scratch memory of each lane starts."""
        waves = np.arange(self.total, dtype=int64)[self.chosen][:, None]
        return (waves * self.lanes + np.arange(self.lanes)) * self.scratch_stride

    def exec_changed(self) -> None:
        """Spell the EXEC mask of the chosen waves out again, after it was written."""
        mask = self.scalar[EXEC, self.chosen].astype(uint64)
        if self.lanes == 64:
            mask = mask | (self.scalar[EXEC + 1, self.chosen].astype(uint64) << uint64(32))
        active = lanes_of_mask(mask, self.lanes)
        self.active[self.chosen] = active
        self._whole[self.chosen] = active.all(1)
        self.all_active = bool(self._whole[self.chosen].all())


Step = Callable[[Waves], None]
"""One instruction, ready to run on the chosen waves."""
Reader = Callable[[Waves], Array]
"""Gives an operand's value for the chosen waves: [count, lanes], or with ones where uniform."""
Writer = Callable[[Waves, Array], None]
"""Stores a result for the chosen waves."""
