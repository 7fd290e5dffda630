"""`nsa-port bench`: the options, the run, the tables.

On a GPU the times are medians of device events and each comes with the share of its floor: the
larger of its arithmetic over the measured matmul peak and its smallest traffic over the measured
copy bandwidth. On a CPU an absolute time says little, as other processes want the same cores:
NSA and dense attention take turns in one run, and their ratio is what counts.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections.abc import Iterable
from dataclasses import asdict
from datetime import date
from importlib.util import find_spec
from typing import Any

import torch

import nsa_port
from nsa_port import environment
from nsa_port.bench import memory as memory_of
from nsa_port.bench import passes
from nsa_port.bench.plot import plot
from nsa_port.bench.shapes import (
    DEFAULT,
    NEIGHBOURS,
    SELECTIONS,
    Heads,
    Shape,
    mean_union,
    parse_heads,
)
from nsa_port.bench.timing import measure_group, measure_peaks, progress
from nsa_port.kernels.geometry import NSAConfig

BOTH = "forward + backward"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `nsa-port bench`."""
    add = parser.add_argument
    add("--backend", help="force a backend; by default the automatic choice")
    add("--device", help="cpu, cuda, ...; by default the accelerator there is, else the CPU")
    add(
        "--shapes",
        nargs="+",
        type=heads_argument,
        default=[DEFAULT],
        metavar="SHAPE",
        help=f"A1, A2, B, or H,HK,Dk,Dv; by default {DEFAULT.name}",
    )
    add("--lengths", nargs="+", type=_lengths, default=[(4096, 8192)], help="in tokens")
    add("--dtype", choices=DTYPES, help="by default bfloat16 on accelerators, float32 on the CPU")
    add(
        "--selection",
        choices=SELECTIONS,
        default="random",
        help="whether neighbouring queries are drawn independently or alike",
    )
    add("--decode", action="store_true", help="also one query over a cache of each length")
    add("--parts", action=argparse.BooleanOptionalAction, default=True, help="time each operator")
    add("--backward", action=argparse.BooleanOptionalAction, default=True)
    add("--memory", action=argparse.BooleanOptionalAction, default=True)
    add("--rounds", type=int, help="how often each is timed; by default until it is worth no more")
    add(
        "--profile",
        action="store_true",
        help="also the time of every kernel inside a call, on GPUs",
    )
    add("--out", metavar="FILE", help="write the results there as JSON")
    add("--plot", metavar="FILE", help="draw time and memory there; needs matplotlib")


DTYPES = ("float32", "float16", "bfloat16", "float64")


def heads_argument(text: str) -> Heads:
    """`parse_heads` with errors as argparse shows them."""
    try:
        return parse_heads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def main(args: argparse.Namespace) -> int:
    """Measure, print the tables, write the files."""
    if args.plot and find_spec("matplotlib") is None:
        print("--plot needs matplotlib: pip install 'nsa-port[demo]'", file=sys.stderr)
        return 2
    results = run(
        args.backend,
        args.device,
        shapes=args.shapes,
        lengths=[length for lengths in args.lengths for length in lengths],
        dtype=args.dtype,
        selection=args.selection,
        decode=args.decode,
        parts=args.parts,
        backward=args.backward,
        memory=args.memory,
        rounds=args.rounds,
        profile=args.profile,
    )
    print(table(results))
    if args.out:
        with open(args.out, "w", encoding="utf-8") as file:
            json.dump(results, file, indent=1)
            file.write("\n")
    if args.plot:
        plot(results, args.plot)
    return 0


def run(
    backend: str | None = None,
    device: str | None = None,
    *,
    shapes: Iterable[Heads] = (DEFAULT,),
    lengths: Iterable[int] = (4096, 8192),
    dtype: str | None = None,
    selection: str = "random",
    config: NSAConfig | None = None,
    decode: bool = False,
    parts: bool = True,
    backward: bool = True,
    memory: bool = True,
    rounds: int | None = None,
    profile: bool = False,
) -> dict[str, Any]:
    """Time and memory of each operator and of the whole at each length, as plain data.

    `rows` holds one entry per measurement: `shape`, `length`, `group` (what takes turns with
    what), `name`, the median `seconds`, the median `cpu_seconds` of all threads, and on a GPU
    `floor_seconds` and `share_of_floor`. `ratios` holds NSA's time over the fastest dense
    attention's, `memory` the peak over the inputs in bytes, `choices` how many different blocks
    neighbouring queries choose.
    """
    device = device or environment.default_device().type
    on_gpu = torch.device(device).type == "cuda"
    dtype = dtype or ("bfloat16" if torch.device(device).type != "cpu" else "float32")
    peaks = measure_peaks(device, dtype) if on_gpu else None
    config = config or NSAConfig()
    results: dict[str, Any] = {
        "date": date.today().isoformat(),
        "machine": machine_facts(device),
        "backend": backend or "automatic",
        "dtype": dtype,
        "selection": selection,
        "config": asdict(config),
        "peaks": None if peaks is None else asdict(peaks),
        "shapes": {},
        "rows": [],
        "ratios": [],
        "memory": [],
        "choices": [],
    }
    lengths = list(lengths)
    for heads in shapes:
        results["shapes"][heads.name] = {**asdict(heads), "ran": {}}
        for length in lengths:
            shape = Shape.of(
                length,
                heads,
                dtype=dtype,
                device=device,
                backend=backend,
                selection=selection,
                config=config,
            )
            here = {"shape": heads.name}
            rows: list[dict[str, Any]] = []
            for group in passes.groups(shape, decode=decode, parts=parts, backward=backward):
                measured = measure_group(shape, group, peaks, rounds, profile and on_gpu)
                rows += [here | row for row in measured]
            results["rows"] += rows
            results["ratios"] += _ratios(rows)
            results["choices"].append(here | _choices(shape))
            results["shapes"][heads.name]["ran"] = _ran(shape)
            for side in memory_of.sides(shape) if memory else ():
                progress(f"{length}: memory of {side}")
                taken = memory_of.peak_memory(shape, side, backward)
                results["memory"].append(here | {"length": length, "name": side, "bytes": taken})
    progress("")
    return results


def table(results: dict[str, Any]) -> str:
    """The results for people."""
    machine = results["machine"]
    lines = [
        f"{machine['device_name']}, torch {machine['torch']}, backend {results['backend']}, "
        f"{results['dtype']}, {results['selection']} inputs"
    ]
    if results["peaks"]:
        flops, bandwidth = (results["peaks"][key] for key in ("flops", "bandwidth"))
        lines.append(
            f"measured peaks: {flops / 1e12:.0f} TFLOP/s, {bandwidth / 1e12:.2f} TB/s copied"
        )
    for name, shape in results["shapes"].items():
        ran = ", ".join(f"{operator}: {backend}" for operator, backend in shape["ran"].items())
        lines.append(f"{name}: {ran}")
    lines.append(
        f"\n{'shape':12}{'length':>8}  {'what':22}{'which':20}{'median ms':>11}{'floor ms':>10}"
        f"{'of floor':>10}"
    )
    for row in results["rows"]:
        floor = "" if row["floor_seconds"] is None else f"{row['floor_seconds'] * 1e3:.3f}"
        share = "" if row["share_of_floor"] is None else f"{row['share_of_floor']:.0%}"
        time_ms = "cannot" if row["seconds"] is None else f"{row['seconds'] * 1e3:.3f}"
        lines.append(
            f"{row['shape']:12}{row['length']:>8}  {row['group']:22}{row['name']:20}"
            f"{time_ms:>11}{floor:>10}{share:>10}"
        )
        for kernel, seconds in row.get("kernels", {}).items():
            lines.append(f"{'':66}{seconds * 1e3:>9.3f}  {kernel[:60]}")
    lines.append(
        f"\n{'shape':12}{'length':>8}  {'what':22}{'NSA / dense':>12}{'CPU time':>10}  next to"
    )
    for row in results["ratios"]:
        lines.append(
            f"{row['shape']:12}{row['length']:>8}  {row['group']:22}{row['ratio']:>12.3f}"
            f"{row['cpu_ratio']:>10.3f}  {row['dense']}"
        )
    if results["memory"]:
        lines.append(f"\n{'shape':12}{'length':>8}  {'peak memory over the inputs, MB':40}")
    for row in results["memory"]:
        taken = "cannot" if row["bytes"] is None else f"{row['bytes'] / 1e6:.1f}"
        lines.append(f"{row['shape']:12}{row['length']:>8}  {row['name']:22}{taken:>12}")
    lines.append(f"\n{'shape':12}{'length':>8}  different blocks of {NEIGHBOURS} neighbours")
    for row in results["choices"]:
        lines.append(f"{row['shape']:12}{row['length']:>8}  {row['mean_union']:.1f}")
    return "\n".join(lines)


def machine_facts(device: str) -> dict[str, Any]:
    """The device and every version that may matter, for recorded results."""
    on_cuda = torch.device(device).type == "cuda"
    name = torch.cuda.get_device_name(device) if on_cuda else _cpu_name()
    triton = environment.find_triton()
    return {
        "device": device,
        "device_name": name,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "triton": triton.version if triton else None,
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
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


def _lengths(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def _ran(shape: Shape) -> dict[str, str | None]:
    """Which backend each operator of the whole takes."""
    q, (k, v) = shape.queries(), shape.keys()
    c = shape.config.num_compressed(shape.length)
    k_cmp, v_cmp = k[:, :c], v[:, :c]
    gates = shape.gates(shape.length)
    found = nsa_port.explain(
        q, k_cmp, v_cmp, k, v, k, v, gates, shape.config, backend=shape.backend
    )
    return found.backends


def _choices(shape: Shape) -> dict[str, Any]:
    indices = passes.choice_of_blocks(shape)
    return {"length": shape.length, "mean_union": mean_union(indices)}


def _ratios(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """NSA's time over that of the fastest dense attention, in each group and in both passes."""
    groups: dict[str, dict[str, dict[str, Any]]] = {}
    for row in rows:
        if row["seconds"]:
            groups.setdefault(row["group"], {})[row["name"]] = row
    if set(passes.WHOLE) <= set(groups):
        first, second = (groups[name] for name in passes.WHOLE)
        groups[BOTH] = {
            name: {**row, **{key: row[key] + second[name][key] for key in _TIMES}}
            for name, row in first.items()
            if name in second
        }
    return [_ratio(group, found) for group, found in groups.items() if _comparable(found)]


_TIMES = ("seconds", "cpu_seconds")


def _comparable(found: dict[str, Any]) -> bool:
    return "NSA" in found and any(name.startswith("dense") for name in found)


def _ratio(group: str, found: dict[str, dict[str, Any]]) -> dict[str, Any]:
    nsa = found["NSA"]
    dense = [row for name, row in found.items() if name.startswith("dense")]
    fastest = min(dense, key=lambda row: row["seconds"])
    return {
        "shape": nsa["shape"],
        "length": nsa["length"],
        "group": group,
        "nsa_seconds": nsa["seconds"],
        "dense_seconds": fastest["seconds"],
        "dense": fastest["name"],
        "ratio": nsa["seconds"] / fastest["seconds"],
        "cpu_ratio": nsa["cpu_seconds"] / fastest["cpu_seconds"],
    }
