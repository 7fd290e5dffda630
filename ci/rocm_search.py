"""Finds the tuned tables of AMD GPUs without one: by compiling, and counting on the emulator.

    PYTHONPATH=. python3 ci/rocm_search.py gfx942 gfx950 --jobs 8
    PYTHONPATH=. python3 ci/rocm_search.py gfx942 --kernels interval_dq   # the others as they are
    PYTHONPATH=. python3 ci/rocm_search.py gfx942 --classes 4,128 2,256   # float32 to 128, ...
    PYTHONPATH=. python3 ci/rocm_search.py gfx1100 --also venv/bin/python   # with another triton

Each candidate is compiled and run on the emulator with few queries and many keys. One that spills
registers or wants more LDS than there is, is out, with the other triton too if there is one. The
rest are ranked by issue cycles, which count
matrix and other instructions by the rates of the instruction set, as if nothing ever waited; half
as many again where a SIMD has only one wave, which waits whenever its memory does (a judgement, no
measurement). Those within a tenth of the fewest are taken to be equal; among them the one that lets
most waves onto a SIMD wins (four are enough), then the fewest bytes asked for, then the fewest
cycles. A kernel of which every candidate is out raises.

Writes `kernels/configs/<arch>.json`, and all candidates with their counts to
`ci/results/rocm-search-<arch>.json`. All five GPUs take half an hour on one core.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import triton

from ci.rocm_measure import Run, measure
from nsa_port.emulator.architectures import ARCHITECTURES
from nsa_port.emulator.report import inspect
from nsa_port.kernels import amd, tables
from nsa_port.kernels import triton as shared
from nsa_port.tune.compile_only import compiling_for
from tests.rocm_calls import FUNCTIONS, OF_SMALL_GROUPS, Shape, calls, choosing

ROOT = Path(__file__).parent.parent
STATUS = (
    "Derived from instruction counts on the emulator (ci/rocm_search.py); never run on the chip."
)
WITHIN = 1.1
ALONE = 1.5
ENOUGH_WAVES = 4
ANY = 2**30
FEW, MANY = 8, 1024
"""Queries of which the keys are split, and are not, at 16 heads."""
UNSET = ("DEPTH", "RELOAD", "waves_per_eu")
"""Values that a candidate without them has as 0."""

Values = dict[str, int]
_Task = tuple[str, str, int, int]
Found = tuple[Values, list[dict[str, Any]]]
"""The entry, and the counts of all candidates, the chosen one marked."""

CLASSES = {(2, 128): (128, 128), (2, 192): (192, 128), (2, 256): (256, 256),
           (4, 128): (128, 128), (4, 256): (256, 256)}  # fmt: skip
"""Element size and largest head dimension of an entry -> the head dimensions it is found with."""


def fixed(arch: str, kernel: str) -> Values:
    """Values that no candidate varies: how work is spread over the chip.

    `largest_group` is where the kernel by block stops executing fewer cycles than the one by query:
    counted with groups of 4, 8 and 16 on gfx1100. With MFMA the one by tile takes its place.
    """
    wide = ARCHITECTURES[arch].generation == 9
    return {
        "selected_by_block": {
            "segment": 128,
            "least_sharing": 4,
            "largest_group": 0 if wide else 8,
            "fewest_queries": 1024,
        },
        "selected_by_query": {"BLOCK_M": 16, "OWN_N": 16, "least_sharing": 2},
        "selected_backward": {"segment": 256},
        "selected_by_wave": {"most_heads": 16},
    }.get(kernel, {})


def candidates(arch: str, kernel: str, size: int, dim: int) -> list[list[Values]]:
    """What to try: of each list, the first that fits.

    Asking for more waves on a SIMD leaves each fewer registers; asking for none lets the compiler
    spread over accumulation registers, between which and the others it then moves to and fro.
    """
    wide = ARCHITECTURES[arch].generation == 9
    found: list[list[Values]] = []
    names: tuple[str, ...] = ("BLOCK_N", "num_warps", "DEPTH")
    if kernel not in _OF_ONE_WAVE and kernel != "selected_by_query":
        names = ("BLOCK_M", *names, "RELOAD")
    for tile in TILES[kernel][wide].get((size, 192 if dim == 128 and size == 2 else dim), ()):
        values = {**dict(zip(names, tile, strict=False)), "num_stages": 1}
        if wide and kernel not in _OF_ONE_WAVE:
            values["matrix_instr_nonkdim"] = 16
            if arch != "gfx950" and size == 2:
                values["kpack"] = 2
        wanted = (3, 2, 1) if kernel in _OF_ONE_WAVE else (2, 0) if wide else (0,)
        found.append([{**values, "waves_per_eu": waves} if waves else values for waves in wanted])
    return found


_OF_ONE_WAVE = ("selected_by_wave", "selected_by_tile")

_Tiles = dict[tuple[int, int], tuple[tuple[int, ...], ...]]

_FORWARD: dict[bool, _Tiles] = {
    True: {
        (2, 192): ((128, 64, 4), (64, 64, 4), (64, 32, 2)),
        (2, 256): ((64, 32, 4), (32, 32, 2)),
        (4, 128): ((32, 32, 2), (16, 16, 1)),
        (4, 256): ((16, 16, 1), (16, 16, 4)),
    },
    False: {
        (2, 192): ((64, 32, 4), (64, 16, 4), (32, 16, 4), (16, 16, 4, 32)),
        (2, 256): ((64, 16, 4), (32, 16, 8, 32), (16, 16, 8, 32)),
        (4, 128): ((16, 16, 8), (16, 16, 8, 16)),
        (4, 256): ((16, 16, 16, 16), (16, 16, 16, 8)),
    },
}
_SCORES: dict[bool, _Tiles] = {
    True: {**_FORWARD[True], (2, 192): ((64, 128, 4), (64, 128, 2), (128, 64, 4), (128, 128, 4))},
    False: _FORWARD[False],
}
_BACKWARD: dict[bool, _Tiles] = {
    True: {
        (2, 192): ((32, 64, 4), (16, 64, 2), (16, 64, 4)),
        (2, 256): ((16, 32, 4), (16, 16, 2), (16, 32, 8)),
        (4, 128): ((16, 32, 4), (16, 16, 2)),
        (4, 256): ((16, 16, 4), (16, 16, 8)),
    },
    False: {
        (2, 192): ((16, 64, 8), (16, 16, 4, 32), (16, 16, 4, 32, 1)),
        (2, 256): ((16, 16, 4, 64, 1), (16, 16, 8, 32)),
        (4, 128): ((16, 16, 8, 16, 1), (16, 16, 16, 16)),
        (4, 256): ((16, 16, 16, 32, 1), (16, 16, 32, 32, 1)),
    },
}
_ONE_QUERY: dict[bool, _Tiles] = {
    True: {(2, 192): ((32, 1),), (2, 256): ((32, 2),), (4, 128): ((16, 1),), (4, 256): ((16, 4),)},
    False: {
        (2, 192): ((32, 1), (16, 1), (16, 2, 64), (32, 4, 32)),
        (2, 256): ((32, 4), (32, 4, 64), (16, 4, 64)),
        (4, 128): ((16, 8), (16, 8, 16)),
        (4, 256): ((16, 8, 16), (16, 16, 16)),
    },
}
_ONE_WAVE: dict[bool, _Tiles] = {
    True: {
        (2, 192): ((64, 1), (32, 1), (16, 1)),
        (2, 256): ((32, 1), (16, 1)),
        (4, 128): ((32, 1), (16, 1)),
        (4, 256): ((16, 1),),
    },
    False: {},
}
_ONE_BLOCK: dict[bool, _Tiles] = {
    True: {
        (2, 192): ((64, 32, 4), (64, 64, 4)),
        (2, 256): ((32, 32, 4), (32, 32, 8)),
        (4, 128): ((32, 32, 4), (16, 16, 4)),
        (4, 256): ((16, 16, 4),),
    },
    False: {
        (2, 192): ((64, 32, 4), (64, 16, 4), (32, 16, 4, 32)),
        (2, 256): ((16, 16, 4, 64), (32, 16, 8, 32)),
        (4, 128): ((16, 16, 4), (16, 16, 4, 16)),
        (4, 256): ((16, 16, 8, 16), (16, 16, 16, 16)),
    },
}
TILES: dict[str, dict[bool, _Tiles]] = {
    "interval_dkdv": _BACKWARD,
    "selected_backward": _BACKWARD,
    "interval_forward": _FORWARD,
    "interval_dq": _FORWARD,
    "block_scores": _SCORES,
    "selected_by_wave": _ONE_WAVE,
    "selected_by_tile": _ONE_WAVE,
    "selected_by_query": _ONE_QUERY,
    "selected_by_block": _ONE_BLOCK,
}
"""Kernel -> has 64 lanes -> (element size, head dimension) -> values in the order of `candidates`.

Kernels of one query at a time have no `BLOCK_M`. RDNA has 256 registers, and float32 as plain
multiply-and-add: most of it needs a `DEPTH`. Of the one by query, which on 64 lanes serves only
tensors beyond the reach of the one by wave, any entry does there that fits.
"""


def problems(arch: str, kernel: str, shape: Shape, values: Values) -> tuple[str, ...]:
    """What keeps the tuned device function from being launched, in any of its forms.

    With few queries the keys of each are split, and their results are written otherwise.
    """
    call, function = FUNCTIONS[kernel]
    found: list[str] = []
    for queries in (shape.queries, FEW, MANY):
        form = replace(shape, queries=queries)
        with only(arch, kernel, values), compiling_for(arch, ANY, only=function) as builds:
            calls(_module(kernel), form)[call]()
        for build in builds:
            found += inspect(build.assembly, build.shared).problems()
    return tuple(dict.fromkeys(found))


@contextmanager
def only(arch: str, kernel: str, values: Values) -> Iterator[None]:
    """Launch a kernel with these values and with nothing else of the entry that the table has."""
    names = {name for row in tables.shipped_table(arch).get(kernel, []) for name in row}
    with choosing(kernel, {**dict.fromkeys(names & set(UNSET), 0), **values}):
        yield


def try_one(arch: str, kernel: str, shape: Shape, values: Values) -> Run | str:
    """The launch of the tuned device function, or why the candidate is out."""
    call, function = FUNCTIONS[kernel]
    try:
        found = problems(arch, kernel, shape, values)
        if found:
            return "; ".join(found)
        with only(arch, kernel, values):
            runs = measure(arch, calls(_module(kernel), shape)[call])
    except Exception as error:  # whatever goes wrong takes the candidate out
        return f"{type(error).__name__}: {error}"[:200]
    return next(run for run in runs if run.name == function)


def _module(kernel: str) -> ModuleType:
    return shared if kernel == "selected_by_query" else amd


def shape_for(arch: str, kernel: str, size: int, dim: int) -> Shape:
    """What the candidates of an entry are compared with, the smaller the longer emulation takes."""
    key_dim, value_dim = CLASSES[size, dim]
    if kernel in ("selected_by_wave", "selected_by_query"):
        queries = 16
    else:
        queries = (256 if ARCHITECTURES[arch].generation == 9 else 128) // size
    group = 4 if kernel in OF_SMALL_GROUPS else 16
    keys = 4096 if kernel == "block_scores" else 1024  # compressed keys are few
    dtype = torch.bfloat16 if size == 2 else torch.float32
    return Shape(queries, keys, group, key_dim, value_dim, dtype=dtype)


def spilled_by(python: str, task: _Task, tried: list[Values]) -> list[str]:
    """What is wrong with each of these values with the triton of another interpreter, or ""."""
    command = [python, "-m", "ci.rocm_search", "--inspect", json.dumps([*task, tried])]
    run = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    found: list[str] = json.loads(run.stdout.splitlines()[-1])
    return found


def _inspect(arch: str, kernel: str, size: int, dim: int, tried: list[Values]) -> list[str]:
    """`spilled_by`, in the other interpreter."""
    shape, found = shape_for(arch, kernel, size, dim), []
    for values in tried:
        try:
            problem = "; ".join(problems(arch, kernel, shape, values))
        except Exception as error:  # whatever goes wrong takes the candidate out
            problem = f"{type(error).__name__}: {error}"[:200]
        found.append(f"triton {triton.__version__}: {problem}" if problem else "")
    return found


def best(runs: list[Run]) -> int:
    """Which of the candidates that fit to take."""
    cost = [run.cycles * (ALONE if run.waves_per_simd < 2 else 1.0) for run in runs]

    def merit(number: int) -> tuple[float, ...]:
        run = runs[number]
        waves = min(run.waves_per_simd, ENOUGH_WAVES)
        return (cost[number] > WITHIN * min(cost), -waves, run.bytes_moved, run.cycles)

    return min(range(len(runs)), key=merit)


def row_of(values: Values, outcome: Run | str) -> dict[str, Any]:
    if isinstance(outcome, str):
        return {**values, "out": outcome}
    return {
        **values,
        "instructions": outcome.instructions,
        "matrix_instructions": outcome.matrix,
        "issue_cycles": round(outcome.cycles),
        "matrix_share": round(outcome.matrix_cycles / outcome.cycles, 3),
        "bytes_moved": outcome.bytes_moved,
        "registers": outcome.facts.vector_registers,
        "lds_bytes": outcome.facts.lds_bytes,
        "waves_per_simd": outcome.waves_per_simd,
    }


def search(task: _Task, also: str | None) -> Found:
    """Find the entry of one kernel."""
    arch, kernel, size, dim = task
    shape = shape_for(arch, kernel, size, dim)
    rows: list[dict[str, Any]] = []
    fitting: list[tuple[Values, Run, int]] = []
    alternatives = [
        [{**fixed(arch, kernel), **values} for values in each]
        for each in candidates(arch, kernel, size, dim)
    ]
    flat = [values for each in alternatives for values in each]
    elsewhere = spilled_by(also, task, flat) if also else [""] * len(flat)
    for each in alternatives:
        for values in each:
            problem = elsewhere[flat.index(values)]
            outcome = problem or try_one(arch, kernel, shape, values)
            rows.append(row_of(values, outcome))
            if isinstance(outcome, Run):
                fitting.append((values, outcome, len(rows) - 1))
                break
    if not fitting:
        raise RuntimeError(f"{task}: every candidate is out: {rows}")
    chosen, _, number = fitting[best([run for _, run, _ in fitting])]
    rows[number]["chosen"] = True
    return {"element_size": size, "head_dim": dim, **chosen}, rows


def write_table(arch: str, kernels: dict[str, list[Values]]) -> None:
    lists = ",\n".join(
        f'    "{kernel}": [\n' + ",\n".join(f"      {json.dumps(row)}" for row in rows) + "\n    ]"
        for kernel, rows in kernels.items()
    )
    head = f'{{\n  "architecture": "{arch}",\n  "status": "{STATUS}",\n  "kernels": {{\n'
    (tables.SHIPPED / f"{arch}.json").write_text(f"{head}{lists}\n  }}\n}}\n")


def _search(task: _Task, also: str | None) -> tuple[_Task, Found]:
    torch.set_num_threads(1)
    started = time.perf_counter()
    found = search(task, also)
    print(*task, len(found[1]), f"candidates, {time.perf_counter() - started:.0f} s", flush=True)
    return task, found


def _class(text: str) -> tuple[int, int]:
    """Of `CLASSES`, "2,128" for (2, 128)."""
    size, dim = map(int, text.split(","))
    if (size, dim) not in CLASSES:
        raise ValueError(text)
    return size, dim


def main() -> None:
    if sys.argv[1:2] == ["--inspect"]:
        print(json.dumps(_inspect(*json.loads(sys.argv[2]))))
        return
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("arch", nargs="+", choices=list(ARCHITECTURES))
    parser.add_argument("--kernels", nargs="+", default=list(TILES), choices=list(TILES))
    parser.add_argument(
        "--classes", nargs="+", type=_class, default=list(CLASSES), metavar="SIZE,HEAD_DIM"
    )
    parser.add_argument("--also", help="python with another triton, which must not spill either")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    arguments = parser.parse_args()
    tasks = [
        (arch, kernel, *entry)
        for arch in arguments.arch
        for kernel in arguments.kernels
        for entry in arguments.classes
        if candidates(arch, kernel, 2, 128)
    ]
    results: dict[str, dict[tuple[str, int, int], Found]] = {arch: {} for arch in arguments.arch}
    with multiprocessing.get_context("spawn").Pool(arguments.jobs) as pool:
        for task, found in pool.imap_unordered(partial(_search, also=arguments.also), tasks):
            results[task[0]][task[1:]] = found
            write(task[0], results[task[0]])


def write(arch: str, found: dict[tuple[str, int, int], Found]) -> None:
    """Put what was found into the table and the reasons; whatever was not stays as it is."""
    reasons = ROOT / "ci" / "results" / f"rocm-search-{arch}.json"
    why: dict[str, Any] = json.loads(reasons.read_text())["kernels"] if reasons.exists() else {}
    kernels = tables.shipped_table(arch) if (tables.SHIPPED / f"{arch}.json").exists() else {}
    for kernel in dict.fromkeys(kernel for kernel, _, _ in found):
        before = {(row["element_size"], row["head_dim"]): row for row in kernels.get(kernel, [])}
        now = {key: before.get(key) for key in CLASSES}
        now |= {key[1:]: entry for key, (entry, _) in found.items() if key[0] == kernel}
        kernels[kernel] = [entry for entry in now.values() if entry is not None]
        counts = why.setdefault(kernel, {})
        for (name, size, dim), (_, rows) in found.items():
            if name == kernel:
                counts[f"{size} bytes, {dim}"] = rows
    write_table(arch, kernels)
    head = {"architecture": arch, "rule": __doc__.split("\n\n")[2], "triton": triton.__version__}
    lines = ",\n".join(
        f'  "{kernel}": {{\n'
        + ",\n".join(
            f'   "{entry}": [\n' + ",\n".join(f"    {json.dumps(row)}" for row in rows) + "\n   ]"
            for entry, rows in entries.items()
        )
        + "\n  }"
        for kernel, entries in why.items()
    )
    reasons.write_text(f'{json.dumps(head, indent=1)[:-2]},\n "kernels": {{\n{lines}\n }}\n}}\n')


if __name__ == "__main__":
    main()
