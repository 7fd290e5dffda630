"""`nsa-port bench`: time and memory of every operator, next to PyTorch's dense causal attention.

On a GPU the times are medians of device events and each comes with the share of its floor: the
larger of its arithmetic over the measured matmul peak and its smallest traffic over the measured
copy bandwidth. On a CPU an absolute time says little, as other processes want the same cores:
NSA and dense attention take turns in one run, and their ratio is what counts.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from datetime import date
from functools import partial
from importlib.util import find_spec
from multiprocessing import get_context
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import pad, scaled_dot_product_attention

import nsa_port
from nsa_port.kernels.geometry import NSAConfig

_SECONDS = 20.0  # how long one group of measurements goes on repeating
_LONG = 60.0  # a first round of this length is not worth repeating to leave out its warm-up


@dataclass(frozen=True)
class Shape:
    """One problem: a causal self-attention of `length` tokens, or one query over a cache."""

    length: int
    heads: int = 16
    kv_heads: int = 2
    key_dim: int = 64
    value_dim: int = 64
    batch: int = 1
    dtype: str = "float32"
    device: str = "cpu"
    backend: str | None = None
    config: NSAConfig = field(default_factory=NSAConfig)

    @property
    def torch_dtype(self) -> torch.dtype:
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype

    def random(self, *shape: int, grad: bool = False) -> Tensor:
        made = torch.empty(self.batch, *shape, dtype=self.torch_dtype, device=self.device)
        return made.normal_().requires_grad_(grad)

    def keys(self, grad: bool = False) -> tuple[Tensor, Tensor]:
        """`k, v [B, length, HK, D]`."""
        k = self.random(self.length, self.kv_heads, self.key_dim, grad=grad)
        return k, self.random(self.length, self.kv_heads, self.value_dim, grad=grad)


@dataclass(frozen=True)
class Work:
    """What an operation has to do at least."""

    flops: float
    elements: float
    """Elements read or written once each."""


@dataclass(frozen=True)
class Peaks:
    """What the device reaches: `flops` per second in matmuls, bytes per second in copies."""

    flops: float
    bandwidth: float

    def floor(self, work: Work, element_size: int) -> float:
        """Seconds below which no implementation of `work` can go."""
        return max(work.flops / self.flops, work.elements * element_size / self.bandwidth)


@dataclass(frozen=True)
class Measured:
    """One operation that was timed, side by side with others of its `group`."""

    group: str
    name: str
    call: Callable[[], object]
    work: Work | None = None


class Sample(NamedTuple):
    """One timed call: by the clock, and what all threads of this process spent on it."""

    seconds: float
    cpu_seconds: float


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `nsa-port bench`."""
    add = parser.add_argument
    add("--backend", help="force a backend; by default the automatic choice")
    add("--device", help="cpu, cuda, ...; by default the accelerator there is, else the CPU")
    add("--lengths", type=_lengths, default=(4096, 8192), help="comma-separated, in tokens")
    add("--heads", type=int, default=16)
    add("--kv-heads", type=int, default=2)
    add("--key-dim", type=int, default=64)
    add("--value-dim", type=int, default=64)
    add("--dtype", default="float32", choices=("float32", "float16", "bfloat16", "float64"))
    add("--decode", action="store_true", help="also one query over a cache of each length")
    add("--parts", action=argparse.BooleanOptionalAction, default=True, help="time each operator")
    add("--backward", action=argparse.BooleanOptionalAction, default=True)
    add("--memory", action=argparse.BooleanOptionalAction, default=True)
    add("--rounds", type=int, help="how often each is timed; by default until it is worth no more")
    add("--json", metavar="FILE", help="write the results there")
    add("--plot", metavar="FILE", help="draw them there; needs matplotlib")


def main(args: argparse.Namespace) -> int:
    """Measure, print the tables, write the files."""
    if args.plot and find_spec("matplotlib") is None:
        print("--plot needs matplotlib: pip install 'nsa-port[demo]'", file=sys.stderr)
        return 2
    results = run(
        args.backend,
        args.device,
        lengths=args.lengths,
        heads=args.heads,
        kv_heads=args.kv_heads,
        key_dim=args.key_dim,
        value_dim=args.value_dim,
        dtype=args.dtype,
        decode=args.decode,
        parts=args.parts,
        backward=args.backward,
        memory=args.memory,
        rounds=args.rounds,
    )
    print(table(results))
    if args.json:
        with open(args.json, "w", encoding="utf-8") as file:
            json.dump(results, file, indent=1)
            file.write("\n")
    if args.plot:
        plot(results, args.plot)
    return 0


def run(
    backend: str | None = None,
    device: str | None = None,
    *,
    lengths: tuple[int, ...] = (4096, 8192),
    heads: int = 16,
    kv_heads: int = 2,
    key_dim: int = 64,
    value_dim: int = 64,
    dtype: str = "float32",
    config: NSAConfig | None = None,
    decode: bool = False,
    parts: bool = True,
    backward: bool = True,
    memory: bool = True,
    rounds: int | None = None,
) -> dict[str, Any]:
    """Time and memory of each operator and of the whole at each length, as plain data.

    `rows` holds one entry per measurement: `length`, `group` (what takes turns with what),
    `name`, the median `seconds`, the median `cpu_seconds` of all threads, `share_of_floor` on a
    GPU. `ratios` holds NSA's time over the
    fastest dense attention's, `memory` the peak over the inputs in bytes.
    """
    device = device or _default_device()
    peaks = _peaks(device, dtype) if torch.device(device).type == "cuda" else None
    results: dict[str, Any] = {
        "date": date.today().isoformat(),
        "machine": _machine(device),
        "backend": backend or "automatic",
        "peaks": None if peaks is None else asdict(peaks),
        "rows": [],
        "ratios": [],
        "memory": [],
    }
    for length in lengths:
        shape = Shape(
            length,
            heads,
            kv_heads,
            key_dim,
            value_dim,
            dtype=dtype,
            device=device,
            backend=backend,
            config=config or NSAConfig(),
        )
        results["shape"] = {key: value for key, value in asdict(shape).items() if key != "length"}
        for group in _groups(shape, decode=decode, parts=parts, backward=backward):
            rows = _measure_group(shape, group, peaks, rounds)
            results["rows"] += rows
            results["ratios"] += _ratios(rows)
        if memory:
            for side in ("nsa", "dense"):
                _progress(f"{length}: memory of {side}")
                taken = peak_memory(shape, side, backward)
                results["memory"].append({"length": length, "name": side, "bytes": taken})
    _progress("")
    return results


def table(results: dict[str, Any]) -> str:
    """The results for people."""
    machine = results["machine"]
    lines = [f"{machine['device_name']}, torch {machine['torch']}, backend {results['backend']}"]
    if results["peaks"]:
        flops, bandwidth = (results["peaks"][key] for key in ("flops", "bandwidth"))
        lines.append(
            f"measured peaks: {flops / 1e12:.0f} TFLOP/s, {bandwidth / 1e12:.2f} TB/s copied"
        )
    lines.append(f"\n{'length':>8}  {'what':22}{'which':26}{'median ms':>11}{'of floor':>10}")
    for row in results["rows"]:
        share = "" if row["share_of_floor"] is None else f"{row['share_of_floor']:.0%}"
        time_ms = "failed" if row["seconds"] is None else f"{row['seconds'] * 1e3:.3f}"
        lines.append(
            f"{row['length']:>8}  {row['group']:22}{row['name']:26}{time_ms:>11}{share:>10}"
        )
    lines.append(f"\n{'length':>8}  {'what':22}{'NSA / dense':>12}{'CPU time':>10}  next to")
    for row in results["ratios"]:
        lines.append(f"{row['length']:>8}  {row['group']:22}{row['ratio']:>12.3f}  {row['dense']}")
    if results["memory"]:
        lines.append(f"\n{'length':>8}  {'peak memory over the inputs, MB':40}")
    for row in results["memory"]:
        lines.append(f"{row['length']:>8}  {row['name']:22}{row['bytes'] / 1e6:>12.1f}")
    return "\n".join(lines)


def plot(results: dict[str, Any], path: str) -> None:
    """Time against length, NSA beside dense attention."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    groups = dict.fromkeys(row["group"] for row in results["ratios"])
    figure, axes = pyplot.subplots(1, max(1, len(groups)), figsize=(5 * max(1, len(groups)), 4))
    for axis, group in zip([axes] if len(groups) < 2 else axes, groups, strict=False):
        rows = [row for row in results["rows"] if row["group"] == group and row["seconds"]]
        for name in dict.fromkeys(row["name"] for row in rows):
            own = [(row["length"], row["seconds"] * 1e3) for row in rows if row["name"] == name]
            axis.loglog(*zip(*own, strict=True), "o-", label=name)
        axis.set(title=group, xlabel="tokens", ylabel="ms")
        axis.legend()
    figure.tight_layout()
    figure.savefig(path)


def _lengths(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def _default_device() -> str:
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator else None
    return "cpu" if accelerator is None else accelerator.type


def _machine(device: str) -> dict[str, Any]:
    on_cuda = torch.device(device).type == "cuda"
    name = torch.cuda.get_device_name(device) if on_cuda else _cpu_name()
    return {
        "device": device,
        "device_name": name,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "nsa_port": nsa_port.__version__,
        "python": platform.python_version(),
    }


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [
                line.split(":", 1)[1].strip() for line in file if line.startswith("model name")
            ]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def _progress(text: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)
    elif text:
        print(text, file=sys.stderr, flush=True)


def _groups(shape: Shape, *, decode: bool, parts: bool, backward: bool) -> Iterator[list[Measured]]:
    """What is measured in turns; each group's tensors live only while it is measured."""
    if parts:
        for operator in _operators(shape):
            yield list(_operator_passes(*operator, backward=backward))
    yield list(_whole(shape, backward))
    if decode:
        yield list(_decode(shape))


def _operators(
    shape: Shape,
) -> Iterator[tuple[str, Callable[..., Any], list[Tensor], Work, Work | None]]:
    """Name, function, the tensors it takes, and the least work forward and backward."""
    T, H, HK, Dk, Dv = shape.length, shape.heads, shape.kv_heads, shape.key_dim, shape.value_dim
    config, B = shape.config, shape.batch
    C = config.num_compressed(T)
    options: dict[str, Any] = {"backend": shape.backend}
    q = shape.random(T, H, Dk, grad=True)
    k, v = shape.keys(grad=True)

    def attention(pairs: int, keys: int) -> tuple[Work, Work]:
        rows, columns = B * T * H * (Dk + Dv), B * keys * HK * (Dk + Dv)
        return (
            Work(2.0 * B * pairs * H * (Dk + Dv), rows + columns),
            Work(2.0 * B * pairs * H * (3 * Dk + 2 * Dv), 2 * rows + 2 * columns),
        )

    def compress(k: Tensor) -> Tensor:
        return nsa_port.mean_compress(k, config, **options)

    compress_work = Work(0, B * (T + C) * HK * Dk)
    yield "mean_compress", compress, [k], compress_work, compress_work
    with torch.no_grad():
        k_cmp, v_cmp = (compress(x).requires_grad_() for x in (k, v))

    def compressed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return nsa_port.compressed_attention(q, k, v, config, **options)[0]

    seen = sum(config.num_compressed(p + 1) for p in range(T))
    yield "compressed_attention", compressed, [q, k_cmp, v_cmp], *attention(seen, C)
    with torch.no_grad():
        _, lse = nsa_port.compressed_attention(q, k_cmp, v_cmp, config, **options)

    def select(q: Tensor, k: Tensor) -> Tensor:
        with torch.no_grad():
            return nsa_port.select_blocks(q, k, lse, config, **options)

    scores = Work(
        2.0 * B * seen * H * Dk, B * (T * H * Dk + C * HK * Dk + T * HK * config.num_selected)
    )
    yield "select_blocks", select, [q, k_cmp], scores, None
    indices = select(q, k_cmp)

    def selected(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return nsa_port.selected_attention(q, k, v, indices, config, **options)[0]

    budget = config.num_selected * config.select_block_size
    seen = sum(min(p + 1, budget) for p in range(T))
    yield "selected_attention", selected, [q, k, v], *attention(seen, T)

    def window(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return nsa_port.window_attention(q, k, v, config, **options)[0]

    seen = sum(min(p + 1, config.window_size) for p in range(T))
    yield "window_attention", window, [q, k, v], *attention(seen, T)

    outputs = [shape.random(T, H, Dv, grad=True) for _ in range(3)]
    gates = _gates(shape, T)

    def combined(o_cmp: Tensor, o_slc: Tensor, o_win: Tensor, gates: Tensor) -> Tensor:
        return nsa_port.combine(o_cmp, o_slc, o_win, gates, **options)

    cells = B * T * H
    forward, back = Work(0, cells * (4 * Dv + 3)), Work(0, cells * (7 * Dv + 6))
    yield "combine", combined, [*outputs, gates], forward, back


def _operator_passes(
    name: str,
    function: Callable[..., Any],
    tensors: list[Tensor],
    forward: Work,
    backward_work: Work | None,
    *,
    backward: bool,
) -> Iterator[Measured]:
    yield Measured(name, "forward", lambda: function(*tensors), forward)
    if backward and backward_work is not None:
        out = function(*tensors)
        grad = torch.randn_like(out)
        yield Measured(
            name,
            "backward",
            lambda: torch.autograd.grad(out, tensors, grad, retain_graph=True),
            backward_work,
        )


def _gates(shape: Shape, length: int, grad: bool = True) -> Tensor:
    gates = torch.empty(
        shape.batch, length, shape.heads, 3, dtype=shape.torch_dtype, device=shape.device
    )
    return gates.uniform_().requires_grad_(grad)


def _nsa(shape: Shape, q: Tensor, k: Tensor, v: Tensor, gates: Tensor) -> Tensor:
    """Compression of k and v, and the attention with one set of keys for all three branches."""
    k_cmp, v_cmp = (nsa_port.mean_compress(x, shape.config, backend=shape.backend) for x in (k, v))
    return nsa_port.nsa_attention(
        q, k_cmp, v_cmp, k, v, k, v, gates, shape.config, backend=shape.backend
    )


def _dense(q: Tensor, k: Tensor, v: Tensor, form: str, causal: bool = True) -> Tensor:
    """PyTorch's attention on `[B, T, H, D]`; unequal widths are padded to keep its fast kernels."""
    width = max(q.shape[-1], v.shape[-1])
    value_dim, scale = v.shape[-1], q.shape[-1] ** -0.5
    q, k, v = (pad(x, (0, width - x.shape[-1])) if x.shape[-1] < width else x for x in (q, k, v))
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    groups = q.shape[1] // k.shape[1]
    if form == "expanded":
        k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))
    elif form == "grouped rows":  # decoding only: the group's heads as queries of one head
        q = q.reshape(q.shape[0], k.shape[1], groups, width)
    kernel = {"flash": SDPBackend.FLASH_ATTENTION, "cuDNN": SDPBackend.CUDNN_ATTENTION}.get(form)
    with nullcontext() if kernel is None else sdpa_kernel(kernel):
        out = scaled_dot_product_attention(
            q, k, v, is_causal=causal, scale=scale, enable_gqa=form in ("gqa", "flash", "cuDNN")
        )
    return out[..., :value_dim]


def _dense_forms(shape: Shape, decoding: bool = False) -> tuple[str, ...]:
    if torch.device(shape.device).type == "cuda":
        return ("flash", "cuDNN")
    return ("gqa", "grouped rows") if decoding else ("gqa", "expanded")


def _whole(shape: Shape, backward: bool) -> Iterator[Measured]:
    """NSA and dense attention, forward only or forward and backward."""
    T, H, Dk, Dv = shape.length, shape.heads, shape.key_dim, shape.value_dim
    group = "forward + backward" if backward else "forward"
    q = shape.random(T, H, Dk, grad=backward)
    k, v = shape.keys(grad=backward)
    gates = _gates(shape, T, grad=backward)
    grad = shape.random(T, H, Dv)

    def passes(forward: Callable[[], Tensor], inputs: list[Tensor], grad: Tensor) -> None:
        out = forward()
        if backward:
            torch.autograd.grad(out, inputs, grad)

    yield Measured(
        group, "NSA", lambda: passes(lambda: _nsa(shape, q, k, v, gates), [q, k, v, gates], grad)
    )
    grad_dense = grad.transpose(1, 2)
    pairs = T * (T + 1) / 2
    flops = 2.0 * shape.batch * H * pairs * ((4 * Dk + 3 * Dv) if backward else (Dk + Dv))
    for form in _dense_forms(shape):

        def dense(form: str = form) -> None:
            passes(lambda: _dense(q, k, v, form), [q, k, v], grad_dense)

        yield Measured(group, f"dense {form}", dense, Work(flops, 0))


def _decode(shape: Shape) -> Iterator[Measured]:
    """One query over a cache whose compressed keys are kept."""
    q, gates = shape.random(1, shape.heads, shape.key_dim), _gates(shape, 1, grad=False)
    k, v = shape.keys()
    k_cmp, v_cmp = (nsa_port.mean_compress(x, shape.config, backend=shape.backend) for x in (k, v))

    def nsa() -> Tensor:
        return nsa_port.nsa_attention(
            q, k_cmp, v_cmp, k, v, k, v, gates, shape.config, backend=shape.backend
        )

    yield Measured("decode", "NSA", nsa)
    for form in _dense_forms(shape, decoding=True):
        call = partial(_dense, q, k, v, form, causal=False)
        yield Measured("decode", f"dense {form}", call)


def _measure_group(
    shape: Shape, group: list[Measured], peaks: Peaks | None, rounds: int | None
) -> list[dict[str, Any]]:
    """Rounds over the whole group, so that what disturbs the machine disturbs all alike."""
    given = rounds is not None
    rounds = _rounds(shape, rounds, group[0].group)
    first: dict[str, Sample] = {}
    failures: dict[str, str] = {}
    for one in group:
        _progress(f"{shape.length}: {one.group}, {one.name}")
        try:
            first[one.name] = _once(one.call, shape.device)
        except RuntimeError as error:  # e.g. a dense kernel that does not take the shape
            failures[one.name] = str(error).splitlines()[0]
    samples: dict[str, list[Sample]] = {name: [] for name in first}
    if sum(sample.seconds for sample in first.values()) > _LONG:
        samples = {name: [sample] for name, sample in first.items()}
        rounds = rounds - 1 if given else 0
    started = time.perf_counter()
    for _ in range(rounds):
        for one in group:
            if one.name in samples:
                samples[one.name].append(_once(one.call, shape.device))
        if not given and time.perf_counter() - started > _SECONDS:
            break
    rows = []
    for one in group:
        taken = samples.get(one.name, [])
        seconds = statistics.median(x.seconds for x in taken) if taken else None
        share = None
        if peaks is not None and one.work is not None and seconds is not None:
            share = peaks.floor(one.work, shape.torch_dtype.itemsize) / seconds
        rows.append(
            {
                "length": shape.length,
                "group": one.group,
                "name": one.name,
                "seconds": seconds,
                "cpu_seconds": statistics.median(x.cpu_seconds for x in taken) if taken else None,
                "runs": len(taken),
                "share_of_floor": share,
                "failed": failures.get(one.name),
            }
        )
    return rows


def _rounds(shape: Shape, given: int | None, group: str) -> int:
    usual = 5 if torch.device(shape.device).type == "cpu" else 20
    rounds = usual if given is None else given
    return 20 * rounds if group == "decode" else rounds


def _once(call: Callable[[], object], device: str) -> Sample:
    """Time one call, by events on CUDA."""
    _synchronize(device)
    cpu_started, started = time.process_time(), time.perf_counter()
    if torch.device(device).type == "cuda":
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        stop.record()
        stop.synchronize()
        seconds = start.elapsed_time(stop) / 1e3
    else:
        call()
        _synchronize(device)
        seconds = time.perf_counter() - started
    return Sample(seconds, time.process_time() - cpu_started)


def _synchronize(device: str) -> None:
    if torch.device(device).type != "cpu":
        torch.accelerator.synchronize()


def _ratios(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """NSA's time over that of the fastest dense attention in the same group."""
    nsa = [row for row in rows if row["name"] == "NSA" and row["seconds"]]
    dense = [row for row in rows if row["name"].startswith("dense") and row["seconds"]]
    if not nsa or not dense:
        return []
    fastest = min(dense, key=lambda row: row["seconds"])
    return [
        {
            "length": nsa[0]["length"],
            "group": nsa[0]["group"],
            "nsa_seconds": nsa[0]["seconds"],
            "dense_seconds": fastest["seconds"],
            "dense": fastest["name"],
            "ratio": nsa[0]["seconds"] / fastest["seconds"],
            "cpu_ratio": nsa[0]["cpu_seconds"] / fastest["cpu_seconds"],
        }
    ]


def _peaks(device: str, dtype: str) -> Peaks:
    """Copy bandwidth (bytes read plus written) and matmul rate, measured."""
    source = torch.empty(1 << 28, dtype=torch.float32, device=device).normal_()
    target = torch.empty_like(source)
    copied = [_once(partial(target.copy_, source), device).seconds for _ in range(10)]
    bandwidth = 2 * source.numel() * source.element_size() / statistics.median(copied[2:])
    n = 8192
    a, b = (
        torch.empty(n, n, dtype=torch.float32, device=device).normal_().to(getattr(torch, dtype))
        for _ in range(2)
    )
    multiplied = [_once(partial(torch.matmul, a, b), device).seconds for _ in range(10)]
    return Peaks(2.0 * n**3 / statistics.median(multiplied[2:]), bandwidth)


def peak_memory(shape: Shape, side: str, backward: bool) -> int:
    """Bytes that one pass needs over its inputs."""
    if torch.device(shape.device).type == "cuda":
        run_pass = _memory_pass(shape, side, backward)
        run_pass()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run_pass()
        return torch.cuda.max_memory_allocated() - before
    with ProcessPoolExecutor(
        1, get_context("spawn"), torch.set_num_threads, (torch.get_num_threads(),)
    ) as pool:
        return pool.submit(_peak_of_process, shape, side, backward).result()


def _memory_pass(shape: Shape, side: str, backward: bool) -> Callable[[], object]:
    nsa, *dense = _whole(shape, backward)
    return (nsa if side == "nsa" else dense[0]).call


def _peak_of_process(shape: Shape, side: str, backward: bool) -> int:
    """The same by the high-water mark of this process, which must be a fresh one."""
    small = Shape(**{**asdict(shape), "length": 64, "config": shape.config})
    _memory_pass(small, side, backward)()  # loads what is loaded once
    run_pass = _memory_pass(shape, side, backward)
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
