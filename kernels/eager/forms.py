"""Which form of the PyTorch kernels a call takes."""

from __future__ import annotations

from enum import Enum

FEW_QUERIES = 16


class Form(Enum):
    """How the branches are computed."""

    STATIC = "no data-dependent shapes, no waiting for the device"
    BLOCK_MAJOR = "one key block at a time, with all the queries that chose it"
    FEW = "one query at a time"


def choose(device_type: str, num_queries: int) -> Form:
    """The form for `num_queries` queries of each batch entry.

    Only a CPU lets the host look at data for nothing; of any other device nothing is assumed.
    """
    if device_type != "cpu":
        return Form.STATIC
    return Form.FEW if num_queries <= FEW_QUERIES else Form.BLOCK_MAJOR
