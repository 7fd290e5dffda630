"""Measuring memory: what one pass needs over its inputs and its output's gradient."""

from __future__ import annotations

import resource
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from functools import partial
from multiprocessing import get_context

import torch

from nsa_port.bench.passes import forms
from nsa_port.bench.shapes import Shape


def sides(shape: Shape) -> list[str]:
    """Whose memory is measured; on a CPU, where it takes a process each, one dense form's."""
    every = list(forms(shape))
    return every if torch.device(shape.device).type == "cuda" else every[:2]


def peak_memory(shape: Shape, side: str, backward: bool) -> int | None:
    """Bytes that one pass of `side` needs over its inputs; None if it does not take the shape."""
    if torch.device(shape.device).type == "cuda":
        try:
            return _peak_of_device(shape, side, backward)
        except RuntimeError:  # e.g. a dense kernel that does not take the shape
            return None
    with ProcessPoolExecutor(
        1, get_context("spawn"), torch.set_num_threads, (torch.get_num_threads(),)
    ) as pool:
        return pool.submit(_peak_of_process, shape, side, backward).result()


def _pass(shape: Shape, side: str, backward: bool) -> Callable[[], object]:
    attend = forms(shape)[side][0]
    q, (k, v) = shape.queries(grad=backward), shape.keys(grad=backward)
    gates = shape.gates(shape.length, grad=backward)
    grad = shape.random(shape.length, shape.heads, shape.value_dim)
    forward = partial(attend, q, k, v, gates)
    if not backward:
        return forward
    inputs = [q, k, v, gates] if side == "NSA" else [q, k, v]
    return lambda: torch.autograd.grad(forward(), inputs, grad)


def _peak_of_device(shape: Shape, side: str, backward: bool) -> int:
    run_pass = _pass(shape, side, backward)
    run_pass()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run_pass()
    return torch.cuda.max_memory_allocated() - before


def _peak_of_process(shape: Shape, side: str, backward: bool) -> int:
    """The same by the high-water mark of this process, which must be a fresh one."""
    small = Shape(**{**asdict(shape), "length": 64, "config": shape.config})
    _pass(small, side, backward)()  # loads what is loaded once
    run_pass = _pass(shape, side, backward)
    before = _high_water_mark()
    run_pass()
    return _high_water_mark() - before


def _high_water_mark() -> int:
    """The most bytes this process ever held.

    Linux hands `ru_maxrss` down to the children of a large process, but keeps `VmHWM` apart.
    """
    try:
        with open("/proc/self/status", encoding="utf-8") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
