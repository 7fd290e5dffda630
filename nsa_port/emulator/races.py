"""Finding data races: workgroups of one launch that exchange data through plain memory accesses.

Workgroups run in no given order, so that a load of what another one stores, or two stores to one
place, has no defined result. Atomics are exempt. Races between the waves of one workgroup (a
missing barrier) are not looked for.
"""

from __future__ import annotations

import numpy as np
from numpy import int32

from nsa_port.emulator.errors import DataRace
from nsa_port.emulator.memory import GlobalMemory
from nsa_port.emulator.number_formats import Array

_GRANULE = 2
"""Bytes that are followed together: one element of the narrowest type that kernels store."""
_SEVERAL = -1


class RaceDetector:
    """Remembers, for each granule of memory, which workgroup stored to it and which loaded it."""

    def __init__(self, memory: GlobalMemory) -> None:
        granules = len(memory.content) // _GRANULE + 16
        self._memory = memory
        self._storer = np.zeros(granules, int32)  # 0: none, n + 1: workgroup n
        self._loader = np.zeros(granules, int32)  # the same, or _SEVERAL

    def load(self, positions: Array, workgroups: Array, size: int) -> None:
        """Note that `workgroups` loaded `size` bytes at `positions` (both 1-D)."""
        reader = (workgroups + 1).astype(int32)
        for granule in _granules(positions, size):
            storer = self._storer[granule]
            self._report(
                (storer != 0) & (storer != reader),
                "a workgroup loads what another one stores",
                granule,
                storer,
                reader,
            )
            before = self._loader[granule]
            self._loader[granule] = reader
            shared = (before != 0) & (before != reader)
            shared |= self._loader[granule] != reader
            self._loader[granule[shared]] = _SEVERAL

    def store(self, positions: Array, workgroups: Array, size: int) -> None:
        """Note that `workgroups` stored `size` bytes at `positions` (both 1-D)."""
        writer = (workgroups + 1).astype(int32)
        for granule in _granules(positions, size):
            loader = self._loader[granule]
            self._report(
                (loader != 0) & (loader != writer),
                "a workgroup stores what another one loads",
                granule,
                loader,
                writer,
            )
            storer = self._storer[granule]
            self._storer[granule] = writer
            together = np.where(storer == 0, self._storer[granule], storer)
            self._report(
                together != writer,
                "two workgroups store to the same address",
                granule,
                together,
                writer,
            )

    def _report(
        self, racing: Array, what: str, granule: Array, earlier: Array, later: Array
    ) -> None:
        if not racing.any():
            return
        first = int(np.flatnonzero(racing)[0])
        position = int(granule[first]) * _GRANULE
        buffer = self._memory.buffer_holding(position)
        other = "several" if earlier[first] == _SEVERAL else int(earlier[first]) - 1
        raise DataRace(
            f"data race: {what}: buffer {buffer.name!r}, byte {position - buffer.start}, "
            f"workgroups {other} and {int(later[first]) - 1}"
        )


def _granules(positions: Array, size: int) -> list[Array]:
    first = positions // _GRANULE
    return [first + step for step in range(max(1, size // _GRANULE))]
