"""Counts what each operator costs on an emulated AMD GPU: its own kernels and CUDA's, side by side.

    PYTHONPATH=. python3 ci/rocm_counts.py gfx942      # a quarter of an hour

"cuda" are the kernels of `nsa_port.kernels.triton` with the values of `sm_90.json`, compiled for
the AMD GPU with the compiler's defaults; "rocm" are those of `nsa_port.kernels.amd` with the GPU's
own table; "generic" what the backend launches on a GPU without a table: its kernels for any AMD GPU
with the values of `generic_gfx.json`. The limit that values of CUDA would not keep, that of the
LDS, is lifted to count them, and noted. Writes `ci/results/rocm-counts.json` and prints the table
for `ci/results/README.md`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import triton

from ci.rocm_measure import Run, measure, without_lds_limit
from nsa_port.emulator.architectures import ARCHITECTURES
from nsa_port.kernels import amd, tables
from nsa_port.kernels import triton as shared
from nsa_port.kernels.triton import splitting
from tests.rocm_calls import Shape, calls

RESULT = Path(__file__).parent / "results" / "rocm-counts.json"
SHAPES = {
    "64 heads, 4 KV heads, 128": Shape(),
    "32 heads, 8 KV heads, 128": Shape(group=4),
    "64 heads, 4 KV heads, 192 and 128": Shape(key_dim=192),
}
"""One KV head of each model: the others do the same."""

COMPILERS_DEFAULTS = {"matrix_instr_nonkdim": 0, "kpack": 1, "waves_per_eu": 0}


@contextmanager
def of_a_long_sequence() -> Iterator[None]:
    """Choose kernels as if there were as many queries as keys: enough to fill a GPU."""
    before = splitting._PROGRAMS_WITHOUT_GPU
    splitting._PROGRAMS_WITHOUT_GPU = 1
    try:
        with tables.tuned_to({"selected_by_block": {"fewest_queries": 0}}):
            yield
    finally:
        splitting._PROGRAMS_WITHOUT_GPU = before


@contextmanager
def values_of_cuda(shape: Shape) -> Iterator[None]:
    """Launch every tuned kernel as `sm_90` does.

    Hopper's own in Gluon cannot be compiled for others: the shared ones take their values.
    """
    size = shape.dtype.itemsize
    changes = {
        kernel: {
            **COMPILERS_DEFAULTS,
            **tables.tuned("sm_90", kernel, size, shape.key_dim, shape.value_dim),
        }
        for kernel in tables.shipped_table("sm_90")
        if not kernel.startswith("hopper")
    }
    for values in changes.values():
        for name in ("gluon", "few_rows", "few_warps"):
            values.pop(name, None)
    with tables.tuned_to(changes), of_a_long_sequence():
        yield


@contextmanager
def values_of_no_table(shape: Shape) -> Iterator[None]:
    """Launch what an AMD GPU without a table gets: nothing that only a known chip is given."""
    size = shape.dtype.itemsize
    changes = {
        kernel: {
            **COMPILERS_DEFAULTS,
            **tables.tuned(tables.GENERIC_AMD, kernel, size, shape.key_dim, shape.value_dim),
        }
        for kernel in tables.shipped_table(tables.GENERIC_AMD)
    }
    changes["selected_by_wave"] = {"most_heads": 0}
    with tables.tuned_to(changes), of_a_long_sequence():
        yield


def totals(runs: list[Run]) -> dict[str, Any]:
    """The sum over the launches of one operator."""
    cycles = sum(run.cycles for run in runs)
    unique = sum(run.bytes_unique for run in runs)
    moved = sum(run.bytes_moved for run in runs)
    largest = max(runs, key=lambda run: run.cycles)
    problems = sorted({f"{run.name}: {text}" for run in runs for text in run.facts.problems()})
    return {
        "instructions": sum(run.instructions for run in runs),
        "issue_cycles": round(cycles),
        "matrix_instructions": sum(run.matrix for run in runs),
        "matrix_share": round(sum(run.matrix_cycles for run in runs) / cycles, 3),
        "bytes_moved": moved,
        "bytes_over_unique": round(moved / unique, 2),
        "lds_passes": sum(run.lds_passes for run in runs),
        "largest_kernel": largest.name,
        "registers": largest.facts.vector_registers,
        "lds_bytes": largest.facts.lds_bytes,
        "waves_per_simd": largest.waves_per_simd,
        "problems": problems,
    }


def count(arch: str, shape: Shape) -> dict[str, dict[str, dict[str, Any]]]:
    """operator -> cuda, rocm, generic -> totals."""
    ours, theirs = calls(amd, shape), calls(shared, shape)
    found = {}
    for operator in ours:
        rocm = totals(measure(arch, ours[operator]))
        with values_of_no_table(shape):
            generic = totals(measure(arch, ours[operator]))
        with values_of_cuda(shape), without_lds_limit(arch):
            runs = measure(arch, theirs[operator])
        cuda = totals([_with_real_limit(arch, run) for run in runs])
        found[operator] = {"cuda": cuda, "rocm": rocm, "generic": generic}
        counts = (each["instructions"] for each in found[operator].values())
        print(f"{operator:24}", *(f"{number:>10}" for number in counts), flush=True)
    return found


def _with_real_limit(arch: str, run: Run) -> Run:
    facts = replace(run.facts, lds_limit=ARCHITECTURES[arch].lds_bytes)
    return replace(run, facts=facts)


def table(found: dict[str, dict[str, dict[str, Any]]]) -> str:
    """Rows of Markdown."""
    lines = [
        "| operator | instructions: cuda | rocm | ratio | generic | matrix share | "
        "bytes over unique | LDS passes |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for operator, each in found.items():
        cuda, rocm = each["cuda"], each["rocm"]
        lines.append(
            f"| {operator} | {cuda['instructions']:,} | {rocm['instructions']:,} | "
            f"{cuda['instructions'] / rocm['instructions']:.2f} | "
            f"{each['generic']['instructions']:,} | "
            f"{cuda['matrix_share']:.2f} to {rocm['matrix_share']:.2f} | "
            f"{cuda['bytes_over_unique']} to {rocm['bytes_over_unique']} | "
            f"{cuda['lds_passes']:,} to {rocm['lds_passes']:,} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("arch", nargs="?", default="gfx942", choices=list(ARCHITECTURES))
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    results: dict[str, Any] = {
        "architecture": arguments.arch,
        "where": "emulated; never run on the chip",
        "triton": triton.__version__,
        "shapes": {},
    }
    before = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    if before.get("architecture") == arguments.arch and before["triton"] == triton.__version__:
        results["shapes"] = before["shapes"]
    for name in arguments.shapes:
        shape = SHAPES[name]
        with of_a_long_sequence():
            found = count(arguments.arch, shape)
        sizes = {key: str(value) for key, value in asdict(shape).items()}
        results["shapes"][name] = {"sizes": sizes, "operators": found}
        print(f"\n{name}\n\n{table(found)}\n", flush=True)
        RESULT.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
