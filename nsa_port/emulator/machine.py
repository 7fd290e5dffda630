"""The machine: starts workgroups and steps their waves together until they end.

All waves that stand at the same instruction run it as one numpy operation over [waves, lanes]. Of
waves that went different ways, those that are furthest behind run, so that loops of different
length meet again at their end.

This is a functional model: memory operations take effect at once, and nothing takes time.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy import int64, uint8, uint32

from nsa_port.emulator.assembly import TRAP_TEMPORARY, Program
from nsa_port.emulator.control_flow import Barrier, Branch, End
from nsa_port.emulator.counters import Counters, Traffic
from nsa_port.emulator.decoder import DecodedProgram, decode
from nsa_port.emulator.errors import EmulatorError, NoProgress
from nsa_port.emulator.memory import GlobalMemory
from nsa_port.emulator.number_formats import Array
from nsa_port.emulator.races import RaceDetector
from nsa_port.emulator.registers import Waves
from nsa_port.emulator.vector_memory import SCRATCH_MARK

WAVES_TOGETHER = 128
"""Waves that are stepped together: more share the cost of a numpy call, fewer stay in the cache."""
MOST_STEPS = 50_000_000
_FAIRNESS = 1000
_MOST_WAVES = 32  # the work-group processor's limit of 1024 lanes, for 32 lanes to a wave


@dataclass(frozen=True, slots=True)
class LaunchShape:
    """grid: workgroups along x, y, z; waves: of one workgroup; lds_bytes: of one workgroup."""

    grid: tuple[int, int, int]
    waves: int
    lds_bytes: int

    @property
    def workgroups(self) -> int:
        return self.grid[0] * self.grid[1] * self.grid[2]


class Machine:
    """Runs one program on the buffers of one memory.

    races: raise `DataRace` when workgroups exchange data through plain accesses. traffic: counts
    memory traffic if given. most_steps: raise `NoProgress` beyond so many steps.
    """

    def __init__(
        self,
        program: Program,
        memory: GlobalMemory,
        *,
        races: bool = True,
        traffic: Traffic | None = None,
        most_steps: int = MOST_STEPS,
    ) -> None:
        self.program = program
        self.memory = memory
        self.counters = Counters([0] * len(program.instructions))
        self._races = races
        self._traffic = traffic
        self._most_steps = most_steps

    def launch(self, shape: LaunchShape, arguments: bytes) -> Counters:
        """Run every workgroup; `arguments` is the content of the argument buffer."""
        limit = self.program.architecture.lds_bytes
        if shape.lds_bytes > limit:
            raise EmulatorError(
                f"the kernel asks for {shape.lds_bytes} bytes of LDS; "
                f"{self.program.architecture.name} has {limit}"
            )
        padded = np.frombuffer(arguments + bytes(256), uint8)
        address = self.memory.add(padded, "the kernel's arguments")
        self.memory.seal()
        detector = RaceDetector(self.memory) if self._races else None
        if self._traffic is not None:
            self._traffic.start(len(self.memory.content))
        together = max(1, WAVES_TOGETHER // shape.waves)
        with np.errstate(all="ignore"):
            for first in range(0, shape.workgroups, together):
                workgroups = np.arange(first, min(shape.workgroups, first + together))
                waves = self._start(workgroups, shape, address)
                waves.races, waves.traffic = detector, self._traffic
                Run(self.program, waves, self.counters, self._most_steps).finish()
        return self.counters

    # ------------------------------------------------------------------------- starting workgroups
    def _start(self, workgroups: Array, shape: LaunchShape, arguments: int) -> Waves:
        descriptor = self.program.descriptor
        static_lds = descriptor.get("group_segment_fixed_size", 0)
        waves = Waves(
            self.program.architecture,
            self.memory,
            workgroups=workgroups,
            waves_per_workgroup=shape.waves,
            vector_registers=decode(self.program).vector_registers,
            lds_bytes=max(shape.lds_bytes, static_lds),
            scratch_bytes=descriptor.get("private_segment_fixed_size", 0),
        )
        first_lane = waves.wave_in_workgroup[:, None] * waves.lanes
        waves.vector[0] = (first_lane + np.arange(waves.lanes)).astype(uint32)
        self._set_scalars(waves, shape, arguments)
        return waves

    def _set_scalars(self, waves: Waves, shape: LaunchShape, arguments: int) -> None:
        """What the hardware puts into the scalar registers, as the kernel descriptor asks."""
        descriptor, scalar, next_register = self.program.descriptor, waves.scalar, 0
        if descriptor.get("user_sgpr_private_segment_buffer"):
            scalar[0], scalar[1], scalar[2], scalar[3] = 0, SCRATCH_MARK, 0xFFFFFFFF, 0
            next_register += 4
        next_register += 2 * descriptor.get("user_sgpr_dispatch_ptr", 0)
        next_register += 2 * descriptor.get("user_sgpr_queue_ptr", 0)
        if descriptor.get("user_sgpr_kernarg_segment_ptr"):
            scalar[next_register] = arguments & 0xFFFFFFFF
            scalar[next_register + 1] = arguments >> 32
            next_register += 2
        next_register += 2 * descriptor.get("user_sgpr_dispatch_id", 0)
        next_register += 2 * descriptor.get("user_sgpr_flat_scratch_init", 0)
        if descriptor.get("user_sgpr_private_segment_size"):
            scalar[next_register] = waves.scratch_bytes
            next_register += 1
        next_register += descriptor.get("user_sgpr_kernarg_preload_length", 0)
        next_register = descriptor.get("user_sgpr_count", next_register)
        columns, rows = shape.grid[0], shape.grid[1]
        workgroup = waves.workgroup
        place = (workgroup % columns, workgroup // columns % rows, workgroup // (columns * rows))
        if waves.architecture.generation >= 12:
            scalar[TRAP_TEMPORARY + 9] = place[0]
            scalar[TRAP_TEMPORARY + 7] = (place[1] & 0xFFFF) | (place[2] << 16)
            scalar[TRAP_TEMPORARY + 8] = waves.wave_in_workgroup << 25
            return
        for axis, number in zip("xyz", place, strict=True):
            if descriptor.get(f"system_sgpr_workgroup_id_{axis}", int(axis == "x")):
                scalar[next_register] = number
                next_register += 1
        if descriptor.get("system_sgpr_workgroup_info"):
            scalar[next_register] = 0
            next_register += 1
        if descriptor.get("system_sgpr_private_segment_wavefront_offset"):
            scalar[next_register] = 0


class Run:
    """Steps some waves to their end; `Machine` makes one for every few workgroups."""

    def __init__(
        self,
        program: Program,
        waves: Waves,
        counters: Counters,
        most_steps: int = MOST_STEPS,
    ) -> None:
        self.program = program
        self.decoded: DecodedProgram = decode(program)
        self.waves = waves
        self.counters = counters
        self.most_steps = most_steps
        self.position = np.zeros(waves.total, int64)
        self.running = np.ones(waves.total, bool)
        self.waiting = np.zeros(waves.total, bool)

    def finish(self) -> None:
        """Step until every wave has ended."""
        turn = 0
        while self.running.any():
            turn += 1
            ready = self.running & ~self.waiting
            if not ready.any():  # whoever they waited for has ended
                self.waiting[:] = False
                continue
            places = self.position[ready]
            # Now and then the foremost: waves behind may be spinning until those have gone on.
            place = int(places.max() if turn % _FAIRNESS == 0 else places.min())
            self.waves.choose(ready & (self.position == place))
            self._advance(place)

    def _advance(self, place: int) -> None:
        """Run the chosen waves until they part, end, wait, or may meet others."""
        waves, counters, decoded = self.waves, self.counters, self.decoded
        steps, controls, joins = decoded.steps, decoded.controls, decoded.joins
        executed, count = counters.executed, waves.count
        together = count == waves.total
        try:
            while True:
                executed[place] += count
                counters.steps += 1
                control = controls.get(place)
                if control is None:
                    steps[place](waves)
                    place += 1
                    if together or place not in joins:
                        continue
                    self.position[waves.chosen] = place
                    return
                if not isinstance(control, Branch):
                    self._stop(control, place)
                    return
                if counters.steps > self.most_steps:
                    raise NoProgress(
                        f"no end after {counters.steps} steps: a loop that does not end, or that "
                        "waits for a workgroup that has not started yet"
                    )
                taken = control.taken(waves)
                if taken.all():
                    place = control.target
                elif not taken.any():
                    place += 1
                else:
                    self.position[waves.chosen] = np.where(taken, control.target, place + 1)
                    return
                if not together:
                    self.position[waves.chosen] = place
                    return
        except EmulatorError as error:
            raise self._located(error, place) from error

    def _stop(self, control: Barrier | End, place: int) -> None:
        chosen = self.waves.chosen
        if isinstance(control, End):
            self.running[chosen] = False
            return
        self.position[chosen] = place + 1
        self.waiting[chosen] = True
        # A workgroup goes on when each of its waves that still runs is waiting.
        slots = self.waves.slot
        still_busy = np.zeros(int(slots[-1]) + 1, bool)
        still_busy[slots[self.running & ~self.waiting]] = True
        self.waiting &= still_busy[slots]

    def _located(self, error: EmulatorError, place: int) -> EmulatorError:
        """The same error, saying which instruction it was and who ran it."""
        instruction = self.program.instructions[place]
        workgroups = np.unique(self.waves.workgroup[self.waves.chosen])
        line = self.program.source_lines[place]
        source = f", source line {line}" if line else ""
        many = f" to {workgroups[-1]}" if len(workgroups) > 1 else ""
        return type(error)(
            f"{error}\n    in `{instruction.text}` (instruction {place}{source}) of "
            f"{self.program.name}, workgroup {workgroups[0]}{many}"
        )
