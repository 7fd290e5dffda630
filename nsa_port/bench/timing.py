"""Measuring time: device events on GPUs, the clock elsewhere, and medians of both."""

from __future__ import annotations

import functools
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nsa_port.bench.floors import Peaks
from nsa_port.bench.passes import Measured
from nsa_port.bench.shapes import Shape

_SECONDS = 20.0  # how long one group of measurements goes on repeating
_LONG = 60.0  # a first round of this length is not worth repeating to leave out its warm-up
_CACHE_BYTES = 1 << 28  # more than any device's last-level cache
_FLUSHES = 8


class Sample(NamedTuple):
    """One timed call: by the clock, and what all threads of this process spent on it."""

    seconds: float
    cpu_seconds: float


def once(call: Callable[[], object], device: str) -> Sample:
    """Time one call: on CUDA by events, and with cold caches as a model would find them."""
    synchronize(device)
    cpu_started, started = time.process_time(), time.perf_counter()
    if torch.device(device).type == "cuda":
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        # Several times, so that the device is still at it when the call's kernels are queued.
        for _ in range(_FLUSHES):
            _cache_flusher(device).zero_()
        start.record()
        call()
        stop.record()
        stop.synchronize()
        seconds = start.elapsed_time(stop) / 1e3
    else:
        call()
        synchronize(device)
        seconds = time.perf_counter() - started
    return Sample(seconds, time.process_time() - cpu_started)


@functools.lru_cache(maxsize=1)
def _cache_flusher(device: str) -> Tensor:
    return torch.empty(_CACHE_BYTES, dtype=torch.uint8, device=device)


def synchronize(device: str) -> None:
    if torch.device(device).type != "cpu":
        torch.accelerator.synchronize()


def measure_peaks(device: str, dtype: str) -> Peaks:
    """Copy bandwidth (bytes read plus written) and matmul rate, measured."""
    source = torch.empty(1 << 28, dtype=torch.float32, device=device).normal_()
    target = torch.empty_like(source)
    copied = [once(partial(target.copy_, source), device).seconds for _ in range(10)]
    bandwidth = 2 * source.numel() * source.element_size() / statistics.median(copied[2:])
    n = 8192
    a, b = (
        torch.empty(n, n, dtype=torch.float32, device=device).normal_().to(getattr(torch, dtype))
        for _ in range(2)
    )
    multiplied = [once(partial(torch.matmul, a, b), device).seconds for _ in range(10)]
    return Peaks(2.0 * n**3 / statistics.median(multiplied[2:]), bandwidth)


def kernel_times(call: Callable[[], object]) -> dict[str, float]:
    """Seconds of each kernel that one call runs on the device, by the profiler."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        call()
        torch.cuda.synchronize()
    return {
        event.key: event.device_time_total / 1e6
        for event in profiler.key_averages()
        if event.device_time_total
    }


def measure_group(
    shape: Shape,
    group: list[Measured],
    peaks: Peaks | None,
    rounds: int | None,
    profile: bool = False,
) -> list[dict[str, Any]]:
    """Rounds over the whole group, so that what disturbs the machine disturbs all alike.

    With `profile` also the `kernels` inside each call.
    """
    given = rounds is not None
    rounds = _rounds(shape, rounds, group[0].group)
    calls: dict[str, Callable[[], object]] = {}
    first: dict[str, Sample] = {}
    failures: dict[str, str] = {}
    for one in group:
        progress(f"{shape.length}: {one.group}, {one.name}")
        try:
            calls[one.name] = one.prepare()
            first[one.name] = once(calls[one.name], shape.device)
        except RuntimeError as error:  # e.g. a dense kernel that does not take the shape
            failures[one.name] = str(error).splitlines()[0]
            calls.pop(one.name, None)
    samples: dict[str, list[Sample]] = {name: [] for name in first}
    if sum(sample.seconds for sample in first.values()) > _LONG:
        samples = {name: [sample] for name, sample in first.items()}
        rounds = rounds - 1 if given else 0
    started = time.perf_counter()
    for _ in range(rounds):
        for name, call in calls.items():
            samples[name].append(once(call, shape.device))
        if not given and time.perf_counter() - started > _SECONDS:
            break
    rows = [
        _row(shape, one, samples.get(one.name, []), peaks, failures.get(one.name)) for one in group
    ]
    if profile:
        for row in rows:
            row["kernels"] = kernel_times(calls[row["name"]]) if row["name"] in calls else {}
    return rows


def _row(
    shape: Shape, one: Measured, taken: list[Sample], peaks: Peaks | None, failed: str | None
) -> dict[str, Any]:
    seconds = statistics.median(x.seconds for x in taken) if taken else None
    floor = None
    if peaks is not None and one.work is not None:
        floor = peaks.floor(one.work, shape.torch_dtype.itemsize)
    return {
        "length": shape.length,
        "group": one.group,
        "name": one.name,
        "seconds": seconds,
        "cpu_seconds": statistics.median(x.cpu_seconds for x in taken) if taken else None,
        "runs": len(taken),
        "floor_seconds": floor,
        "share_of_floor": floor / seconds if floor and seconds else None,
        "failed": failed,
    }


def _rounds(shape: Shape, given: int | None, group: str) -> int:
    usual = 5 if torch.device(shape.device).type == "cpu" else 20
    rounds = usual if given is None else given
    return 20 * rounds if group == "decode" else rounds


def progress(text: str) -> None:
    """Say what is going on: one line that is written over on a terminal, lines elsewhere."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)
    elif text:
        print(text, file=sys.stderr, flush=True)
