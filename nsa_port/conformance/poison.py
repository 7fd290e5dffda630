"""Memory that must not be read before it is written, made to tell when it is."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def uninitialised_memory_is_nan() -> Iterator[None]:
    """Make `torch.empty` and its kin return NaN (or the largest integer), also from C++."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    memory = torch.utils.deterministic
    fill = memory.fill_uninitialized_memory  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True, warn_only=True)
    memory.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    try:
        yield
    finally:
        memory.fill_uninitialized_memory = fill  # type: ignore[attr-defined]
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)


@contextmanager
def allocator_holds(device: torch.device, value: float) -> Iterator[None]:
    """Leave freed blocks of every size full of `value` for the next allocations to pick up."""
    sizes = [2**exponent for exponent in range(7, 23)]
    blocks = [torch.full((size,), value, device=device) for size in sizes for _ in range(4)]
    del blocks
    yield
