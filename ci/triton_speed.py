"""Times the Triton operators on the GPU at hand, and tries the values of their tuned tables.

    PYTHONPATH=. python3 ci/triton_speed.py table --shapes A2 B --lengths 8192 65536 --out t.json
    PYTHONPATH=. python3 ci/triton_speed.py sweep --shapes A2 --length 32768 --out s.json

`table` gives the median time of every operator. `sweep` compiles candidates in parallel without
the GPU, drops those that spill registers, then times the rest one after the other. `both` then
makes the table with what the sweep found fastest.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nsa_port.kernels.geometry import Layout, NSAConfig


@dataclass(frozen=True)
class Shape:
    """A model's attention, by the names that the results use."""

    heads: int
    kv_heads: int
    key_dim: int
    value_dim: int


SHAPES = {
    "A1": Shape(64, 4, 192, 128),
    "A2": Shape(64, 4, 128, 128),
    "B": Shape(32, 8, 128, 128),
}

OPERATORS_OF = {
    "interval_forward": ("compressed", "window"),
    "interval_dq": ("compressed_backward", "window_backward"),
    "interval_dkdv": ("compressed_backward", "window_backward"),
    "block_scores": ("select",),
    "selected_by_query": ("selected_by_query",),
    "selected_by_block": ("selected_by_block",),
    "selected_backward": ("selected_backward",),
}
"""The operators that a tuned kernel's values show up in."""

GRIDS: dict[str, dict[str, tuple[int, ...]]] = {
    "interval_forward": {
        "BLOCK_M": (64, 128), "BLOCK_N": (32, 64, 128), "num_warps": (4, 8), "num_stages": (2, 3),
    },
    "interval_dq": {
        "BLOCK_M": (64, 128), "BLOCK_N": (32, 64, 128), "num_warps": (4, 8), "num_stages": (1, 2),
    },
    "interval_dkdv": {
        "BLOCK_M": (32, 64, 128), "BLOCK_N": (64, 128), "num_warps": (4, 8), "num_stages": (1, 2),
    },
    "block_scores": {
        "BLOCK_M": (64, 128), "BLOCK_N": (64, 128), "num_warps": (4, 8), "num_stages": (1, 2, 3),
    },
    "selected_by_query": {"BLOCK_N": (32, 64), "num_warps": (1, 2), "num_stages": (2, 3)},
    "selected_by_block": {"BLOCK_M": (64, 128), "num_warps": (4, 8), "num_stages": (1, 2, 3)},
    "selected_backward": {"BLOCK_M": (32, 64, 128), "num_warps": (4, 8), "num_stages": (1, 2, 3)},
}  # fmt: skip
"""The candidates of each kernel; what is not named keeps the table's value."""


@contextmanager
def tuned_to(changes: dict[str, dict[str, int]]) -> Iterator[None]:
    """Change some values of some kernels' tuned entries."""
    from nsa_port.kernels.triton import (
        host,
        interval,
        interval_backward,
        selected,
        selected_backward,
        selection,
    )

    original = host.tuned

    def changed(arch: str, kernel: str, *sizes: int) -> dict[str, int]:
        entry = original(arch, kernel, *sizes)
        return {**entry, **changes.get(kernel, {})}

    modules = (interval, interval_backward, selected, selected_backward, selection)
    for module in modules:
        module.tuned = changed
    try:
        yield
    finally:
        for module in modules:
            module.tuned = original


def random_selection(T: int, HK: int, config: NSAConfig, device: str) -> Tensor:
    """Uniformly random blocks beside the forced ones, ascending: the worst case for sharing."""
    m, n = config.select_block_size, config.num_selected
    blocks = config.num_select_blocks(T)
    parts = []
    for first in range(0, T, 8192):
        own = torch.arange(first, min(first + 8192, T), device=device) // m
        score = torch.rand(len(own), HK, blocks, device=device)
        block = torch.arange(blocks, device=device)
        distance = own[:, None] - block
        forced = (block < config.init_blocks) | (distance < config.local_blocks)
        score.masked_fill_(forced[:, None], 2.0).masked_fill_((distance < 0)[:, None], -1.0)
        value, index = score.topk(min(n, blocks), -1)
        index = index.masked_fill(value < 0, blocks).sort(-1).values
        parts.append(index.masked_fill(index == blocks, -1).to(torch.int32))
    chosen = torch.cat(parts)[None]
    return torch.nn.functional.pad(chosen, (0, n - chosen.shape[-1]), value=-1).contiguous()


def operators(shape: Shape, T: int, device: str) -> dict[str, Callable[[], Any]]:
    """Every operator as a call without arguments, on random bfloat16 inputs of one sequence."""
    from nsa_port.kernels import triton as kernels

    config, layout = NSAConfig(), Layout(T)
    scale = shape.key_dim**-0.5
    H, HK, Dk, Dv = shape.heads, shape.kv_heads, shape.key_dim, shape.value_dim

    def random(*size: int) -> Tensor:
        return torch.randn(*size, device=device, dtype=torch.bfloat16)

    C = config.num_compressed(T)
    q, grad = random(1, T, H, Dk), random(1, T, H, Dv)
    k, v, k_cmp, v_cmp = (
        random(1, size, HK, dim) for size, dim in ((T, Dk), (T, Dv), (C, Dk), (C, Dv))
    )
    outputs = [random(1, T, H, Dv) for _ in range(3)]
    gates = torch.rand(1, T, H, 3, device=device, dtype=torch.bfloat16)
    indices = random_selection(T, HK, config, device)
    tail = (config, layout, scale)
    compressed = (q, k_cmp, v_cmp)
    window = (q, k, v)
    selected = (q, k, v, indices)
    out_c, lse_c = kernels.compressed_attention(*compressed, *tail)
    out_w, lse_w = kernels.window_attention(*window, *tail)
    out_s, lse_s = kernels.selected_attention(*selected, *tail)

    def by(design: str) -> Callable[[], Any]:
        limits = {"by_block": (0, 1 << 30), "by_query": (1 << 30, 0)}[design]
        change = {"fewest_queries": limits[0], "largest_group": limits[1]}

        def call() -> Any:
            with also_tuned_to("selected_by_block", change):
                return kernels.selected_attention(*selected, *tail)

        return call

    return {
        "mean_compress": lambda: kernels.mean_compress(k, config, layout, C),
        "mean_compress_backward": lambda: kernels.mean_compress_backward(k_cmp, config, layout),
        "compressed": lambda: kernels.compressed_attention(*compressed, *tail),
        "select": lambda: kernels.select_blocks(q, k_cmp, lse_c, *tail),
        "selected": lambda: kernels.selected_attention(*selected, *tail),
        "selected_by_query": by("by_query"),
        "selected_by_block": by("by_block"),
        "window": lambda: kernels.window_attention(*window, *tail),
        "combine": lambda: kernels.combine(*outputs, gates),
        "compressed_backward": lambda: kernels.compressed_attention_backward(
            grad, None, *compressed, out_c, lse_c, *tail
        ),
        "selected_backward": lambda: kernels.selected_attention_backward(
            grad, None, *selected, out_s, lse_s, *tail
        ),
        "window_backward": lambda: kernels.window_attention_backward(
            grad, None, *window, out_w, lse_w, *tail
        ),
        "combine_backward": lambda: kernels.combine_backward(grad, *outputs, gates),
    }


@contextmanager
def also_tuned_to(kernel: str, change: dict[str, int]) -> Iterator[None]:
    """Change one kernel's values on top of what `tuned_to` has changed."""
    from nsa_port.kernels.triton import selected

    current = selected.tuned

    def changed(arch: str, name: str, *sizes: int) -> dict[str, int]:
        entry = current(arch, name, *sizes)
        return {**entry, **change} if name == kernel else entry

    selected.tuned = changed
    try:
        yield
    finally:
        selected.tuned = current


def median_ms(call: Callable[[], Any], repeats: int) -> float:
    """The median of single calls, by device events, after two that warm up."""
    for _ in range(2):
        call()
    times = []
    for _ in range(repeats):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop))
    return sorted(times)[repeats // 2]


def kernel_times(call: Callable[[], Any]) -> dict[str, float]:
    """Milliseconds of each kernel inside one call."""
    from torch.profiler import ProfilerActivity, profile

    call()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        call()
        torch.cuda.synchronize()
    times: dict[str, float] = {}
    for event in profiler.key_averages():
        if event.device_time_total:
            times[event.key[:48]] = round(event.device_time_total / 1e3, 3)
    return times


def candidates(kernel: str, chosen: dict[str, list[dict[str, int]]]) -> list[dict[str, int]]:
    """The chosen candidates of a kernel, or all of its grid."""
    if chosen:
        return chosen.get(kernel, [])
    grid = GRIDS[kernel]
    return [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]


def compile_candidate(task: tuple[str, str, str, dict[str, int]]) -> str:
    """Compile one candidate without a GPU. An empty string, or why it is out."""
    arch, name, kernel, candidate = task
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    torch.set_num_threads(1)
    from nsa_port.tune.compile_only import compiling_for

    with compiling_for(arch) as builds:
        try:
            calls = operators(SHAPES[name], 320, "cpu")
            builds.clear()
            with tuned_to({kernel: candidate}):
                for operator in OPERATORS_OF[kernel]:
                    calls[operator]()
        except Exception as error:  # any failure to compile takes the candidate out
            return repr(error)[:200]
    spilling = [build.name for build in builds if build.stack > 64]
    return f"spills: {spilling}" if spilling else ""


def sweep(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    major, minor = torch.cuda.get_device_capability()
    chosen = json.loads(arguments.candidates.read_text()) if arguments.candidates else {}
    tasks = [
        (f"sm_{major}{minor}", name, kernel, candidate)
        for name in arguments.shapes
        for kernel in arguments.kernels
        for candidate in candidates(kernel, chosen)
    ]
    context = multiprocessing.get_context("spawn")
    with context.Pool(max(1, (os.cpu_count() or 2) - 2)) as pool:
        verdicts = pool.map(compile_candidate, tasks, chunksize=1)
    print(f"{len(tasks)} candidates, {sum(not v for v in verdicts)} to time", flush=True)
    results = []
    for name in arguments.shapes:
        calls = operators(SHAPES[name], arguments.length, "cuda")
        for kernel in arguments.kernels:
            found = []
            for task, verdict in zip(tasks, verdicts, strict=True):
                if task[1:3] != (name, kernel):
                    continue
                row: dict[str, Any] = {"shape": name, "kernel": kernel, **task[3]}
                if verdict:
                    results.append({**row, "out": verdict})
                    continue
                with tuned_to({kernel: task[3]}):
                    for operator in OPERATORS_OF[kernel]:
                        try:
                            row[operator] = round(median_ms(calls[operator], 3), 3)
                        except Exception as error:  # too much shared memory, say
                            row["out"] = repr(error)[:200]
                            break
                results.append(row)
                if "out" not in row:
                    found.append(row)
            for operator in OPERATORS_OF[kernel]:
                for row in sorted(found, key=lambda row: row[operator])[:3]:
                    print(row, flush=True)
        del calls
    return results


def best_of(results: list[dict[str, Any]]) -> dict[str, dict[str, dict[str, int]]]:
    """Of a sweep's results, the fastest values of each shape's kernels."""
    fastest: dict[tuple[str, str], tuple[float, dict[str, int]]] = {}
    for row in results:
        kernel = row["kernel"]
        if "out" in row:
            continue
        total = sum(row[operator] for operator in OPERATORS_OF[kernel])
        values = {name: row[name] for name in (*GRIDS[kernel], "BLOCK_N") if name in row}
        key = (row["shape"], kernel)
        if key not in fastest or total < fastest[key][0]:
            fastest[key] = (total, values)
    best: dict[str, dict[str, dict[str, int]]] = {}
    for (shape, kernel), (_, values) in fastest.items():
        best.setdefault(shape, {})[kernel] = values
    return best


def sweep_and_table(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """A sweep over some shapes, then the table of all shapes with what was fastest.

    A shape that was not swept takes the values of one with the same head dimensions.
    """
    results = sweep(arguments)
    save(arguments, results)
    best = best_of(results)
    for name, shape in SHAPES.items():
        like = [
            other
            for other in best
            if SHAPES[other].key_dim == shape.key_dim and SHAPES[other].value_dim == shape.value_dim
        ]
        arguments.shapes = [name]
        with tuned_to(best[name] if name in best else best[like[0]] if like else {}):
            results += table(arguments)
        save(arguments, results)
    return results


def table(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    results = []
    for name, length in itertools.product(arguments.shapes, arguments.lengths):
        calls = operators(SHAPES[name], length, "cuda")
        for operator, call in calls.items():
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            row: dict[str, Any] = {"shape": name, "length": length, "operator": operator}
            row["ms"] = round(median_ms(call, 5), 3)
            row["peak_mib"] = (torch.cuda.max_memory_allocated() - before) >> 20
            if arguments.kernels_too:
                row["kernels"] = kernel_times(call)
            print(row, flush=True)
            results.append(row)
        del calls
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("job", choices=("table", "sweep", "both"))
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--lengths", nargs="+", type=int, default=[8192, 16384, 32768, 65536])
    parser.add_argument("--length", type=int, default=32768, help="of a sweep")
    parser.add_argument("--kernels", nargs="+", default=list(GRIDS), choices=list(GRIDS))
    parser.add_argument("--candidates", type=Path, help="JSON: kernel -> values to try")
    parser.add_argument("--kernels-too", action="store_true", help="time each kernel inside a call")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    job = {"sweep": sweep, "table": table, "both": sweep_and_table}[arguments.job]
    save(arguments, job(arguments))


def save(arguments: argparse.Namespace, results: list[dict[str, Any]]) -> None:
    """Write the results beside what they were measured on."""
    if arguments.out:
        facts = {
            "device": torch.cuda.get_device_name(),
            "torch": torch.__version__,
            "triton": version("triton"),
            "python": sys.version.split()[0],
        }
        arguments.out.write_text(json.dumps({**facts, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
