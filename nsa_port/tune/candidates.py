"""What is tried: every tuned kernel, where its values show, and which values are worth a try."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from nsa_port.kernels.tables import Values

Grid = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Kernel:
    """One kernel that has tuned values.

    Args:
        function: the device function that they go to.
        calls: the calls of `calls.CALLS` that launch it, each of which is timed.
        cuda, rocm: value -> what to try on GPUs of that maker; what is not named, and what the
            architecture's table does not have, keeps the table's value.
        along_with: values of kernels that make the calls take this one.
        keys_alone: its entries are for the key dimension, whatever the values' is.
    """

    function: str
    calls: tuple[str, ...]
    cuda: Grid
    rocm: Grid
    along_with: Mapping[str, Values] = field(default_factory=dict)
    keys_alone: bool = False


_ALWAYS = 1 << 30
_AMD = {"matrix_instr_nonkdim": (16, 32), "waves_per_eu": (0, 2)}

KERNELS: dict[str, Kernel] = {
    "interval_forward": Kernel(
        "_interval_forward_kernel",
        ("compressed", "window"),
        {"BLOCK_M": (64, 128), "BLOCK_N": (32, 64, 128), "num_warps": (4, 8), "num_stages": (2, 3)},
        {"BLOCK_M": (64, 128), "BLOCK_N": (32, 64), "num_warps": (4, 8), "num_stages": (1, 2)}
        | _AMD,
        along_with={"hopper_forward": {"fewest_queries": _ALWAYS}},
    ),
    "interval_dq": Kernel(
        "_interval_dq_kernel",
        ("compressed_backward", "window_backward"),
        {"BLOCK_M": (64, 128), "BLOCK_N": (32, 64, 128), "num_warps": (4, 8), "num_stages": (1, 2)},
        {"BLOCK_M": (32, 64, 128), "BLOCK_N": (32, 64), "num_warps": (4, 8)} | _AMD,
        along_with={"hopper_dq": {"fewest_queries": _ALWAYS}},
    ),
    "interval_dkdv": Kernel(
        "_interval_dkdv_kernel",
        ("compressed_backward", "window_backward"),
        {"BLOCK_M": (32, 64, 128), "BLOCK_N": (64, 128), "num_warps": (4, 8), "num_stages": (1, 2)},
        {"BLOCK_M": (32, 64), "BLOCK_N": (32, 64, 128), "num_warps": (4, 8)} | _AMD,
        along_with={"hopper_dkdv": {"fewest_queries": _ALWAYS}},
    ),
    "hopper_forward": Kernel(
        "_hopper_forward_kernel",
        ("compressed", "window"),
        {"BLOCK_N": (64, 128), "num_stages": (2, 3, 4)},
        {},
    ),
    "hopper_dq": Kernel(
        "_hopper_dq_kernel",
        ("compressed_backward", "window_backward"),
        {"BLOCK_N": (64, 128), "num_stages": (2, 3, 4)},
        {},
    ),
    "hopper_dkdv": Kernel(
        "_hopper_dkdv_kernel",
        ("compressed_backward", "window_backward"),
        {"BLOCK_M": (32, 64), "num_stages": (2, 3, 4)},
        {},
    ),
    "hopper_selected": Kernel(
        "_hopper_selected_kernel",
        ("selected",),
        {"num_stages": (2, 3), "least_sharing": (2, 3, 4)},
        {},
        along_with={
            "hopper_by_block": {"fewest_queries": _ALWAYS},
            "selected_by_block": {"largest_group": 0},
        },
    ),
    "hopper_by_block": Kernel(
        "_hopper_by_block_kernel",
        ("selected",),
        {"segment_tiles": (4, 8, 16), "least_sharing": (4, 6, 8)},
        {},
        along_with={"hopper_by_block": {"fewest_queries": 0, "fewest_of_large": 0}},
    ),
    "hopper_merge": Kernel(
        "_hopper_merge_kernel",
        ("selected",),
        {"num_stages": (2, 3)},
        {},
        along_with={"hopper_by_block": {"fewest_queries": 0, "fewest_of_large": 0}},
    ),
    "hopper_scores": Kernel(
        "_hopper_scores_kernel",
        ("select",),
        {"num_stages": (3, 4), "key_stages": (3, 4)},
        {},
        keys_alone=True,
    ),
    "block_scores": Kernel(
        "_block_scores_kernel",
        ("select",),
        {"BLOCK_M": (64, 128), "BLOCK_N": (64, 128), "num_warps": (4, 8), "num_stages": (1, 2, 3)},
        {"BLOCK_M": (32, 64, 128), "BLOCK_N": (64, 128), "num_warps": (4, 8)} | _AMD,
        along_with={"hopper_scores": {"fewest_queries": _ALWAYS}},
        keys_alone=True,
    ),
    "selected_by_query": Kernel(
        "_by_query_kernel",
        ("selected",),
        {"BLOCK_M": (16, 64), "BLOCK_N": (32, 64), "num_warps": (1, 4), "num_stages": (2, 3)},
        {"BLOCK_N": (16, 32, 64), "num_warps": (1, 2), "num_stages": (1, 2)} | _AMD,
        along_with={
            "hopper_by_block": {"fewest_queries": _ALWAYS},
            "hopper_selected": {"fewest_queries": _ALWAYS},
            "selected_by_block": {"largest_group": 0},
            "selected_by_wave": {"most_heads": 0},
        },
    ),
    "selected_by_block": Kernel(
        "_by_block_kernel",
        ("selected",),
        {"BLOCK_M": (64, 128), "num_warps": (4, 8), "num_stages": (1, 2, 3)},
        {"BLOCK_M": (32, 64, 128), "num_warps": (4, 8)} | _AMD,
        along_with={
            "hopper_by_block": {"fewest_queries": _ALWAYS},
            "selected_by_block": {"largest_group": _ALWAYS, "fewest_queries": 0},
            "selected_by_wave": {"most_heads": 0},
        },
    ),
    "selected_by_wave": Kernel(
        "_by_wave_kernel",
        ("selected",),
        {},
        {"BLOCK_N": (16, 32, 64), "waves_per_eu": (0, 1, 2, 3)},
        along_with={"selected_by_block": {"largest_group": 0}},
    ),
    "selected_by_tile": Kernel(
        "_by_tile_kernel",
        ("selected",),
        {},
        {"BLOCK_N": (16, 32, 64), "waves_per_eu": (0, 1, 2, 3)},
        along_with={"selected_by_block": {"largest_group": 0}},
    ),
    "selected_backward": Kernel(
        "_by_block_backward_kernel",
        ("selected_backward",),
        # In Gluon, where the table has it so, the kernel sets its tiles itself: one candidate.
        {"BLOCK_M": (32, 64, 128), "num_warps": (4, 8), "num_stages": (1, 2, 3), "gluon": (0,)},
        {"BLOCK_M": (32, 64), "num_warps": (4, 8)} | _AMD,
    ),
}  # fmt: skip


def candidates(kernel: str, maker: str, shipped: Values) -> Iterator[Values]:
    """The shipped values, then every other combination of the kernel's grid over them."""
    grid = getattr(KERNELS[kernel], maker)
    names = [name for name in grid if name in shipped]
    yield shipped
    for values in itertools.product(*(grid[name] for name in names)):
        candidate = {**shipped, **dict(zip(names, values, strict=True))}
        if candidate != shipped:
            yield candidate
