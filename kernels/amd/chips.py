"""What the kernels here need to know of an architecture: facts, where tables hold choices."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

LARGEST_OFFSET = 2**29
"""Elements of 4 bytes that a buffer instruction reaches from its base."""


@dataclass(frozen=True, slots=True)
class Chip:
    """One architecture with MFMA.

    mfma_version: Triton's number for its layouts.
    depths: the inner size of its MFMA of 16 x 16, by the bytes of an element.
    dies: compute dies, each with an L2 cache of its own, to which workgroups go in turn.
    rounds_bfloat16: has an instruction that rounds float32 to bfloat16.
    """

    mfma_version: int
    dies: int = 1
    rounds_bfloat16: bool = False
    depths: Mapping[int, int] = field(default_factory=lambda: {2: 16, 4: 4})


CHIPS: Mapping[str, Chip] = {
    "gfx90a": Chip(mfma_version=2),
    "gfx942": Chip(mfma_version=3, dies=8),
    "gfx950": Chip(mfma_version=4, dies=8, rounds_bfloat16=True, depths={2: 32, 4: 4}),
}
"""MI250X shows each of its two dies as a device; MI300X and MI355X have eight in one."""


def lanes_of(arch: str) -> int:
    """Lanes of a wave: 64 or 32; 0 in the interpreter, which has none."""
    if not arch:
        return 0
    return 64 if arch.startswith("gfx9") else 32
