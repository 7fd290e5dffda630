"""Counting what a launch did: instructions always, memory traffic and LDS passes when asked."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from nsa_port.emulator.architectures import Architecture
from nsa_port.emulator.number_formats import Array

_LINE_BITS = 7
"""Cache lines have 128 bytes."""
_LANES_PER_PASS = {1: 64, 2: 64, 4: 64, 8: 32, 16: 16}
"""Lanes that the LDS serves at once, by the bytes that each asks for."""


@dataclass(slots=True)
class Counters:
    """What one launch executed; an instruction of one wave counts one.

    executed: by position in the program. steps: passes of the interpreter, each for many waves.
    """

    executed: list[int]
    steps: int = 0

    @property
    def instructions(self) -> int:
        return sum(self.executed)


@dataclass(slots=True)
class Traffic:
    """What one launch moved. Cache lines and LDS passes are taken from the first wave that runs an
    instruction and multiplied by the waves that run it with it.

    loaded, stored: bytes asked for by all lanes. lines: cache lines that the instructions touched.
    passes: turns that the LDS needed, least_passes: as many without any bank conflict.
    """

    architecture: Architecture
    loaded: int = 0
    stored: int = 0
    lines: int = 0
    passes: int = 0
    least_passes: int = 0
    _touched: Array = field(default_factory=lambda: np.zeros(0, bool))

    @property
    def moved(self) -> int:
        return self.loaded + self.stored

    @property
    def unique(self) -> int:
        """Bytes of memory that were touched at all."""
        return int(self._touched.sum())

    def start(self, memory_bytes: int) -> None:
        """Make room for a launch over that many bytes of memory."""
        self._touched = np.zeros(memory_bytes + 64, bool)

    def global_access(self, positions: Array, enabled: Array, size: int, *, stores: bool) -> None:
        """Count one access of `size` bytes per enabled lane ([waves, lanes])."""
        used = positions[enabled]
        if stores:
            self.stored += len(used) * size
        else:
            self.loaded += len(used) * size
        for byte in range(size):
            self._touched[used + byte] = True
        first = positions[0][enabled[0]]
        lines = np.concatenate([first >> _LINE_BITS, (first + size - 1) >> _LINE_BITS])
        self.lines += len(np.unique(lines)) * len(positions)

    def lds_access(self, positions: Array, size: int) -> None:
        """Count the passes of one LDS access of `size` bytes per lane ([waves, lanes])."""
        waves, lanes = positions.shape
        together = min(_LANES_PER_PASS.get(size, 16), lanes)
        banks = self.architecture.lds_banks
        words = positions[0] >> 2
        for start in range(0, lanes, together):
            spans = words[start : start + together, None] + np.arange(max(size // 4, 1))
            asked = np.unique(spans)
            self.passes += waves * int(np.bincount(asked % banks, minlength=banks).max())
            self.least_passes += waves * -(-len(asked) // banks)
