"""Times NSA as a whole on an NVIDIA GPU, through the public functions, next to its targets.

Forward is `mean_compress` of K and V, then `nsa_attention`; backward is all of its gradients. Times
are medians of device events around calls that follow one another without a pause; where it is said,
around replays of a CUDA graph, without the host's time. Prints one line per measurement, and has
all so far in the JSON file.

    python ci/cuda_targets.py --out targets.json
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import nsa_port
from nsa_port.bench.shapes import STANDARD, Heads, Shape

SHAPES = STANDARD | {
    "G1": Heads("G1", 16, 16, 128, 128),
    "G64": Heads("G64", 64, 1, 128, 128),
}

TARGETS = {
    ("A2", 8192): (2.2, 4.9),
    ("A2", 16384): (4.7, 10.8),
    ("A2", 32768): (11.5, 25.0),
    ("A2", 65536): (28.0, 58.0),
    ("A1", 8192): (3.0, 7.5),
    ("A1", 16384): (6.3, 16.5),
    ("A1", 32768): (15.5, 38.0),
    ("A1", 65536): (40.0, 92.0),
    ("B", 8192): (1.7, 3.4),
    ("B", 16384): (3.6, 7.0),
    ("B", 32768): (8.5, 15.5),
    ("B", 65536): (22.0, 36.0),
}
"""Milliseconds, forward and backward, bfloat16, batch 1, random inputs, on an NVIDIA H200."""


@dataclass
class Call:
    """One whole forward and backward; `cu_seqlens` packs the tokens into sequences."""

    shape: str
    T: int
    batch: int = 1
    lengths: tuple[int, ...] = ()
    correlated: bool = False

    def __post_init__(self) -> None:
        self.config = nsa_port.NSAConfig()
        shape = Shape.of(
            self.T,
            SHAPES[self.shape],
            batch=self.batch,
            dtype="bfloat16",
            device="cuda",
            selection="correlated" if self.correlated else "random",
        )
        self.cu = None
        if self.lengths:
            self.cu = torch.tensor([0, *self.lengths]).cumsum(0).to(torch.int32).cuda()
        self.q, self.gates = shape.queries(), shape.gates(self.T)
        self.k, self.v = zip(*(shape.keys() for _ in range(3)), strict=True)
        self.do = shape.random(self.T, shape.heads, shape.value_dim)
        self.inputs = [self.q, *self.k, *self.v, self.gates]
        for tensor in self.inputs:
            tensor.requires_grad_()

    def forward(self) -> Tensor:
        (k_cmp, k_slc, k_win), (v_cmp, v_slc, v_win) = self.k, self.v
        options: dict[str, Any] = {"cu_seqlens": self.cu, "backend": "cuda"}
        # As many rows as are always enough: an exact count would synchronise.
        rows = self.T // self.config.block_stride if self.lengths else None
        k_cmp, v_cmp = (
            nsa_port.mean_compress(x, self.config, num_blocks=rows, **options)
            for x in (k_cmp, v_cmp)
        )
        return nsa_port.nsa_attention(
            self.q, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, self.gates, self.config, **options
        )

    def backward(self, out: Tensor) -> None:
        torch.autograd.grad(out, self.inputs, self.do)


def medians(call: Call, repeats: int) -> dict[str, Any]:
    """Forward and backward milliseconds, host milliseconds to issue them, and peak memory."""
    call.backward(call.forward())
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call.backward(call.forward())
    peak = torch.cuda.max_memory_allocated() - before
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(2 * repeats + 1)]
    torch.cuda.synchronize()
    marks[0].record()
    host = []
    for i in range(repeats):
        started = time.perf_counter()
        out = call.forward()
        middle = time.perf_counter()
        marks[2 * i + 1].record()
        call.backward(out)
        marks[2 * i + 2].record()
        host.append((middle - started, time.perf_counter() - middle))
    torch.cuda.synchronize()
    times = [first.elapsed_time(second) for first, second in pairwise(marks)]
    return {
        "forward_ms": round(_median(times[0::2]), 3),
        "backward_ms": round(_median(times[1::2]), 3),
        "host_forward_ms": round(1e3 * min(first for first, _ in host), 3),
        "host_backward_ms": round(1e3 * min(second for _, second in host), 3),
        "peak_gib": round(peak / 2**30, 2),
    }


def _median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]


def batch_and_singles(batch: Call, single: Call, repeats: int) -> dict[str, float]:
    """A batch, and as many calls of one sequence; in turn, so that the GPU's clock is the same."""
    for call in (batch, single):
        call.backward(call.forward())
    totals = []
    for _ in range(repeats):
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(2 * batch.batch + 3)]
        marks[0].record()
        for i in range(batch.batch + 1):
            call = single if i < batch.batch else batch
            out = call.forward()
            marks[2 * i + 1].record()
            call.backward(out)
            marks[2 * i + 2].record()
        torch.cuda.synchronize()
        times = [first.elapsed_time(second) for first, second in pairwise(marks)]
        totals.append((times[-2], times[-1], sum(times[0:-2:2]), sum(times[1:-2:2])))
    names = ("forward_ms", "backward_ms", "singles_forward_ms", "singles_backward_ms")
    return {
        name: round(_median(list(values)), 3)
        for name, values in zip(names, zip(*totals, strict=True), strict=True)
    }


def dense(T: int, batch: int, repeats: int) -> dict[str, float]:
    """Forward and backward of causal dense attention in A2's shape, cuDNN's."""
    shape = Shape.of(T, SHAPES["A2"], batch=batch, dtype="bfloat16", device="cuda")
    tensors = (shape.queries(), *shape.keys(), shape.random(T, shape.heads, shape.value_dim))
    *inputs, do = (x.transpose(1, 2).contiguous() for x in tensors)
    q, k, v = (x.requires_grad_() for x in inputs)

    def forward() -> Tensor:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return torch.nn.functional.scaled_dot_product_attention(
                q, k, v, is_causal=True, enable_gqa=True
            )

    # First: what autograd keeps of a call outside the graph's stream, a graph may not capture.
    in_a_graph = graph_ms(lambda: torch.autograd.grad(forward(), (q, k, v), do), repeats)
    out = forward()
    return {
        "forward_ms": round(median_ms(forward, repeats), 3),
        "backward_ms": round(
            median_ms(lambda: torch.autograd.grad(out, (q, k, v), do, retain_graph=True), repeats),
            3,
        ),
        "both_in_a_graph_ms": in_a_graph,
    }


def decode_ms(batch: int, context: int, repeats: int) -> float:
    """One more token of `batch` sequences in A2's shape, its compressed keys at hand."""
    config = nsa_port.NSAConfig()
    shape = Shape.of(context, SHAPES["A2"], batch=batch, dtype="bfloat16", device="cuda")
    k, v = shape.keys()
    k_cmp, v_cmp = (nsa_port.mean_compress(x, config, backend="cuda") for x in (k, v))
    q = shape.random(1, shape.heads, shape.key_dim)
    gates = shape.gates(1)
    with torch.no_grad():
        return graph_ms(
            lambda: nsa_port.nsa_attention(
                q, k_cmp, v_cmp, k, v, k, v, gates, config, backend="cuda"
            ),
            repeats,
        )


def graph_ms(call: Callable[[], Any], repeats: int) -> float:
    """Of a call that is captured in a CUDA graph and replayed."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return round(median_ms(graph.replay, 4 * repeats), 4)


def median_ms(call: Callable[[], Any], repeats: int) -> float:
    call()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    marks[0].record()
    for mark in marks[1:]:
        call()
        mark.record()
    torch.cuda.synchronize()
    return _median([first.elapsed_time(second) for first, second in pairwise(marks)])


def measure(repeats: int, keep: Callable[[list[dict[str, Any]]], None]) -> None:
    rows: list[dict[str, Any]] = []

    def note(row: dict[str, Any]) -> None:
        rows.append(row)
        print(row, flush=True)
        keep(rows)
        torch.cuda.empty_cache()

    def add(name: str, call: Call, in_a_graph: bool = False) -> None:
        torch.manual_seed(0)
        row = {"what": name, "shape": call.shape, "T": call.T, **medians(call, repeats)}
        if name in ("random", "correlated") and (call.shape, call.T) in TARGETS:
            row["must_forward_ms"], row["must_backward_ms"] = TARGETS[call.shape, call.T]
        if call.batch > 1:
            row["batch"] = call.batch
        if in_a_graph:
            row["both_in_a_graph_ms"] = graph_ms(lambda: call.backward(call.forward()), repeats)
        note(row)

    for shape in ("A2", "A1", "B"):
        for T in (8192, 16384, 32768, 65536):
            add("random", Call(shape, T))
            if shape != "A1":
                add("correlated", Call(shape, T, correlated=True))
    for shape in ("G1", "G64"):
        add("group", Call(shape, 16384))
    calls = Call("A2", 8192, batch=8), Call("A2", 8192)
    note({"what": "batch of 8", "T": 8192, **batch_and_singles(*calls, repeats)})
    del calls
    mixed = (1, 63, 700, 4097, 8192, 2500, 12000, 5215)
    add("packed", Call("A2", sum(mixed), lengths=mixed))
    add("unpacked", Call("A2", sum(mixed)))
    for T in (512, 1024):
        for batch in (1, 16):
            add("short", Call("A2", T, batch), in_a_graph=True)
            note({"what": "short, dense", "T": T, "batch": batch, **dense(T, batch, repeats)})
    for batch, context in ((1, 8192), (1, 65536), (16, 8192), (16, 65536), (64, 8192), (64, 65536)):
        ms = decode_ms(batch, context, repeats)
        note({"what": "decode, in a graph", "T": context, "batch": batch, "forward_ms": ms})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    facts = {
        "date": datetime.date.today().isoformat(),
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": version("triton"),
        "python": sys.version.split()[0],
        "nsa_port": nsa_port.__version__,
    }

    def keep(rows: list[dict[str, Any]]) -> None:
        if arguments.out:
            text = json.dumps({**facts, "measurements": rows}, indent=1) + "\n"
            arguments.out.write_text(text, encoding="utf-8")

    measure(arguments.repeats, keep)


if __name__ == "__main__":
    main()
