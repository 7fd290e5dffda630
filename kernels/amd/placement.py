"""Which of an operator's work items a workgroup takes, and where a tile of queries lies."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from nsa_port.kernels.triton.host import cdiv


@gluon.jit
def item_of(i_workgroup, items, DIES: gl.constexpr):
    """The item of a workgroup, `items` or more for those left over.

    A GPU of several dies, each with an L2 of its own, hands out workgroups to them in turn: `w`
    runs on die `w % DIES`. Each die takes a run of items. Launch `workgroups(items, DIES)`.
    """
    if DIES == 1:
        return i_workgroup
    return i_workgroup % DIES * ((items + DIES - 1) // DIES) + i_workgroup // DIES


def workgroups(items: int, dies: int) -> int:
    """How many workgroups cover the items."""
    return cdiv(items, dies) * dies
