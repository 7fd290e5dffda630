"""How kernels that only move data are spread over waves."""

from __future__ import annotations

from nsa_port.kernels.triton.host import next_power_of_2

MOST_LAYERS = 2**16 - 1
"""The longest second and third axis of a grid."""

_ELEMENTS = 2048
"""Of a wave's tile: loads enough at once to hide latency, and room for more waves."""


def rows_of_a_wave(count: int, dim: int) -> int:
    """How many of `count` rows of `dim` elements one wave takes at a time, a power of two."""
    fitting = max(1, _ELEMENTS // next_power_of_2(dim))
    return min(fitting, next_power_of_2(count))
