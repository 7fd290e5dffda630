"""Every case of the suite, in the order it runs."""

from __future__ import annotations

from nsa_port.conformance import (
    level0,
    level1,
    level2,
    level3,
    level3_peers,
    level4,
    level4_torch,
    level5,
)
from nsa_port.conformance.case import Case

CASES: tuple[Case, ...] = (
    *level0.CASES,
    *level1.CASES,
    *level2.CASES,
    *level3.CASES,
    *level3_peers.CASES,
    *level4.CASES,
    *level4_torch.CASES,
    *level5.CASES,
)


def case(id: str) -> Case:
    """The case called `id`."""
    return {case.id: case for case in CASES}[id]
