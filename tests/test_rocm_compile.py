"""Every tuned entry for an AMD GPU compiles for it, fits it, and uses its units. Needs no GPU."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

from ci import rocm_search
from nsa_port.emulator.architectures import ARCHITECTURES
from nsa_port.emulator.report import Compiled, inspect
from nsa_port.kernels import amd, tables
from nsa_port.kernels import triton as shared
from nsa_port.tune.compile_only import compiling_for
from tests.rocm_calls import FUNCTIONS, OF_SMALL_GROUPS, Shape, calls, choosing

TABLES: dict[str, tuple[str, ...]] = {
    **{arch: (arch,) for arch in ARCHITECTURES},
    tables.GENERIC_AMD: tuple(ARCHITECTURES),
}
"""Table -> the architectures to compile it for."""

ANY = 2**30
"""Of LDS: what does not fit is to be seen."""

SPLITTING = ("interval_forward", "selected_by_wave", "selected_by_query")
"""Kernels that split the keys of few queries, and then write their results otherwise."""

VARIED = (
    "BLOCK_M", "BLOCK_N", "num_warps", "num_stages", "DEPTH", "RELOAD", "matrix_instr_nonkdim",
    "kpack", "waves_per_eu",
)  # fmt: skip
"""Values that candidates of the search differ in."""


def entries() -> list[tuple[str, str, str, int]]:
    return [
        (table, arch, kernel, index)
        for table, architectures in TABLES.items()
        for arch in architectures
        for kernel, rows in tables.shipped_table(table).items()
        for index in range(len(rows))
    ]


def built(arch: str, kernel: str, shape: Shape, values: dict[str, int]) -> Compiled:
    """The device function of a tuned kernel, compiled with these values."""
    call, function = FUNCTIONS[kernel]
    # The kernel that others take in place of `selected_by_wave`.
    module = shared if kernel == "selected_by_query" else amd
    with choosing(kernel, values), compiling_for(arch, ANY, only=function) as builds:
        calls(module, shape)[call]()
    build = builds[0]
    return inspect(build.assembly, build.shared)


@pytest.mark.parametrize(("table", "arch", "kernel", "index"), entries())
def test_every_tuned_entry_fits_its_gpu(table: str, arch: str, kernel: str, index: int) -> None:
    """At the largest head dimension that the entry is for; 192 is 192 and 128, as in the paper."""
    row = tables.shipped_table(table)[kernel][index]
    value_dim = 128 if row["head_dim"] == 192 else row["head_dim"]
    dtype = torch.bfloat16 if row["element_size"] == 2 else torch.float32
    group = 4 if kernel in OF_SMALL_GROUPS else 16
    shape = Shape(1024, 2048, group, row["head_dim"], value_dim, dtype=dtype)
    facts = built(arch, kernel, shape, tables.values_of(row))
    assert facts.problems() == ()
    if kernel in SPLITTING:
        split = built(arch, kernel, replace(shape, queries=8), tables.values_of(row))
        assert split.problems() == ()
    # A slot without a block has row -1: the compiler cannot know that no offset is negative.
    assert facts.buffer_loads > 0 or kernel == "selected_by_query"
    # RDNA has no matrix instruction for float32.
    has_matrix = row["element_size"] == 2 or ARCHITECTURES[arch].generation == 9
    assert bool(facts.matrix_instructions) == has_matrix
    if kernel in ("selected_by_wave", "selected_by_tile"):
        assert facts.lds_bytes == 0, "a tile goes through the LDS"


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_tuned_entry_is_what_the_search_chose(arch: str) -> None:
    path = Path(__file__).parent.parent / "ci" / "results" / f"rocm-search-{arch}.json"
    counted = json.loads(path.read_text())["kernels"]
    for kernel, rows in tables.shipped_table(arch).items():
        for row in rows:
            found = counted[kernel][f"{row['element_size']} bytes, {row['head_dim']}"]
            (chosen,) = [each for each in found if each.get("chosen")]
            assert [chosen.get(name) for name in VARIED] == [row.get(name) for name in VARIED]
            assert "out" not in chosen


def test_a_candidate_of_the_search_keeps_nothing_of_the_entry_that_the_table_has() -> None:
    candidate = {"BLOCK_M": 16, "BLOCK_N": 16, "num_warps": 2, "num_stages": 1}
    assert tables.tuned("gfx1201", "interval_dkdv", 4, 256)["DEPTH"]
    with rocm_search.only("gfx1201", "interval_dkdv", candidate):
        tried = tables.tuned("gfx1201", "interval_dkdv", 4, 256)
    assert {name: value for name, value in tried.items() if value} == candidate


@pytest.mark.parametrize(
    ("kernel", "groups"),
    [("interval_forward", (1, 5, 40)), ("selected_by_tile", (1, 5)), ("selected_by_wave", (9, 40))],
)
def test_group_sizes_that_fill_no_tile_fit_too(kernel: str, groups: tuple[int, ...]) -> None:
    for group in groups:
        shape = replace(Shape(256, 2048), group=group)
        assert built("gfx942", kernel, shape, {}).problems() == ()


@pytest.mark.parametrize("arch", ["gfx942", "gfx1100"])
def test_the_choice_of_a_single_block_compiles_in_time(arch: str) -> None:
    """In a process of its own: nothing here can stop LLVM once it has begun."""
    code = (
        "import sys, torch\n"
        "from nsa_port.kernels import amd\n"
        "from nsa_port.kernels.geometry import Layout, NSAConfig\n"
        "from nsa_port.tune.compile_only import compiling_for\n"
        "config = NSAConfig(16, 8, 32, 1, init_blocks=0, local_blocks=1, window_size=1)\n"
        "q, k, lse = torch.zeros(1, 59, 2, 32), torch.zeros(1, 6, 1, 32), torch.zeros(1, 59, 2)\n"
        "with compiling_for(sys.argv[1]) as builds:\n"
        "    amd.select_blocks(q, k, lse, config, Layout(59), 0.1)\n"
        "assert all(build.stack == 0 for build in builds)\n"
    )
    root = Path(__file__).parent.parent
    subprocess.run([sys.executable, "-c", code, arch], cwd=root, timeout=180, check=True)
