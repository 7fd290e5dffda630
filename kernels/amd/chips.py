"""What the kernels here need to know of an architecture: facts, where tables hold choices."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from nsa_port.kernels.triton.host import multiprocessors

LARGEST_OFFSET = 2**29
"""Elements of 4 bytes that a buffer instruction reaches from its base."""


@dataclass(frozen=True, slots=True)
class Chip:
    """One architecture with MFMA.

    mfma_version: Triton's number for its layouts.
    depths: the inner size of its MFMA of 16 x 16, by the bytes of an element.
    dies: compute dies of the largest GPU, each with an L2 cache of its own, to which workgroups go
        in turn.
    units_of_a_die: how many compute units one of several dies has, by product.
    rounds_bfloat16: has an instruction that rounds float32 to bfloat16.
    """

    mfma_version: int
    dies: int = 1
    units_of_a_die: tuple[int, ...] = ()
    rounds_bfloat16: bool = False
    depths: Mapping[int, int] = field(default_factory=lambda: {2: 16, 4: 4})


CHIPS: Mapping[str, Chip] = {
    "gfx90a": Chip(mfma_version=2),
    "gfx942": Chip(mfma_version=3, dies=8, units_of_a_die=(38, 20)),
    "gfx950": Chip(
        mfma_version=4, dies=8, units_of_a_die=(32,), rounds_bfloat16=True, depths={2: 32, 4: 4}
    ),
}
"""MI250X shows each of its two dies as a device. MI300X, MI325X and MI355X have eight in one,
MI300A six, MI308X four, of 20 units each; a partition (DPX, QPX, CPX) has its share of them."""


def dies_of(arch: str, device: torch.device) -> int:
    """How many dies the device has: a whole GPU, or a partition of one. An emulated GPU is whole.

    1 where the compute units are no multiple of any die's, so that nothing is assumed of them.
    """
    chip = CHIPS[arch]
    if device.type == "cpu":
        return chip.dies
    units = multiprocessors(device)
    return next((units // each for each in chip.units_of_a_die if units % each == 0), 1)


def lanes_of(arch: str) -> int:
    """Lanes of a wave: 64 or 32; 0 in the interpreter, which has none."""
    if not arch:
        return 0
    return 64 if arch.startswith("gfx9") else 32
