"""Every tuned entry compiles for its architecture, fits it and does not spill. Needs no GPU."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

from triton import knobs

from nsa_port.kernels import triton as kernels
from nsa_port.kernels.geometry import Layout, NSAConfig
from nsa_port.kernels.tables import shipped_table, tuned_to, values_of
from nsa_port.tune.candidates import KERNELS
from nsa_port.tune.compile_only import SHARED_MEMORY, Build, compiling_for
from nsa_port.tune.machine_code import early_signals, reads_before_writes

CONFIG = NSAConfig()
FUNCTIONS = {name: kernel.function for name, kernel in KERNELS.items() if kernel.cuda}
"""Tuned kernel -> the device function that its values go to."""

TABLES = {"sm_80": "sm_80", "sm_90": "sm_90", "sm_100": "sm_100", "generic": "sm_80"}
"""Table -> the architecture to compile it for."""

A_FEW_SCALARS = 32
"""Bytes that a kernel written for Hopper may spill: what it needs between its loops."""

WORKERS = {"hopper_selected": 4, "hopper_merge": 4}
"""Warps that such a kernel has besides those that it is launched with, where not 8."""

LEAST_LENGTHS = {
    "selected_by_block": 1024, "block_scores": 1100, "hopper_scores": 1100,
    "hopper_by_block": 24576, "hopper_merge": 24576,
}  # fmt: skip
"""What some kernels take from some length on only. Nothing is scored where all is chosen."""

LEAST_SHARED_MEMORY = 99 * 1024
"""What the architectures without a table have: sm_86, sm_89 and sm_120 the least."""


def faults(build: Build) -> list[str]:
    """What a look at the machine code and the assembly finds wrong."""
    return [*reads_before_writes(build.binary), *early_signals(build.assembly)]


def entries() -> list[tuple[str, str, int, tuple[int, int]]]:
    """Every entry at the head dimensions that it names, or at the largest it allows."""
    return [
        (table, kernel, index, tuple(pair))
        for table in TABLES
        for kernel, rows in shipped_table(table).items()
        for index, row in enumerate(rows)
        for pair in row.get("exact_dims", [_largest_dims(row["head_dim"])])
    ]


def _largest_dims(head_dim: int) -> tuple[int, int]:
    return head_dim, 128 if head_dim == 192 else head_dim


def launch(
    kernel: str,
    key_dim: int,
    value_dim: int,
    dtype: torch.dtype,
    T: int = 320,
    G: int = 16,
    packed: bool = False,
) -> None:
    """A call that launches a tuned kernel; the contents of the tensors do not matter."""
    G = 4 if kernel == "selected_by_block" else G
    T = max(T, LEAST_LENGTHS.get(kernel, 0))
    C = CONFIG.num_compressed(T)

    def tensor(length: int, heads: int, dim: int) -> torch.Tensor:
        return torch.zeros(1, length, heads, dim, dtype=dtype)

    q, k, v = tensor(T, G, key_dim), tensor(T, 1, key_dim), tensor(T, 1, value_dim)
    k_cmp, v_cmp = tensor(C, 1, key_dim), tensor(C, 1, value_dim)
    out, lse = tensor(T, G, value_dim), torch.zeros(1, T, G)
    indices = torch.zeros(1, T, 1, CONFIG.num_selected, dtype=torch.int32)
    ends = torch.tensor([0, T], dtype=torch.int32) if packed else None
    tail = (CONFIG, Layout(T, cu_seqlens=ends, cu_seqlens_k=ends), 0.1)
    if kernel in ("interval_forward", "hopper_forward"):
        kernels.compressed_attention(q, k_cmp, v_cmp, *tail)
    elif kernel in ("interval_dq", "interval_dkdv", "hopper_dq", "hopper_dkdv"):
        kernels.compressed_attention_backward(out, None, q, k_cmp, v_cmp, out, lse, *tail)
    elif kernel in ("block_scores", "hopper_scores"):
        kernels.select_blocks(q, k_cmp, lse, *tail)
    elif kernel == "selected_backward":
        kernels.selected_attention_backward(out, None, q, k, v, indices, out, lse, *tail)
    else:
        kernels.selected_attention(q, k, v, indices, *tail)


@pytest.mark.parametrize(("table", "kernel", "index", "dims"), entries(), ids=str)
def test_every_tuned_entry_fits_its_architecture(
    table: str, kernel: str, index: int, dims: tuple[int, int]
) -> None:
    row = shipped_table(table)[kernel][index]
    dtype = torch.bfloat16 if row["element_size"] == 2 else torch.float32
    changes = {**KERNELS[kernel].along_with, kernel: values_of(row)}
    compiling = compiling_for(TABLES[table], only=FUNCTIONS[kernel])
    with compiling as builds, tuned_to(changes):
        launch(kernel, *dims, dtype)
    (build,) = builds
    room = LEAST_SHARED_MEMORY if table == "generic" else SHARED_MEMORY[table]
    assert build.shared <= room, f"{build.shared} bytes of shared memory, {room} available"
    on_hopper = kernel.startswith("hopper")
    allowed = A_FEW_SCALARS if on_hopper or row.get("gluon") else 0
    assert build.stack <= allowed, f"spills {build.stack} bytes of registers"
    assert build.num_warps == row["num_warps"] + on_hopper * WORKERS.get(kernel, 8)
    if table == "sm_90":  # where ptxas is known to lose what sets a descriptor of wgmma
        assert not faults(build)
        assert build.uses_wgmma == ("exact_dims" in row), "wgmma where it should be, only there"


@pytest.mark.parametrize("kernel", ["hopper_by_block", "hopper_merge"])
@pytest.mark.parametrize("dims", [(64, 64), (128, 128), (192, 128)], ids=str)
@pytest.mark.parametrize("group", [1, 2, 4, 8])
def test_small_groups_fit_hopper_by_block(kernel: str, dims: tuple[int, int], group: int) -> None:
    with compiling_for("sm_90", only=FUNCTIONS[kernel]) as builds:
        launch(kernel, *dims, torch.bfloat16, G=group)
    (build,) = builds
    assert build.shared <= SHARED_MEMORY["sm_90"]
    assert build.stack <= A_FEW_SCALARS
    assert not faults(build)


@pytest.mark.parametrize("group", [1, 4, 8, 32])
@pytest.mark.parametrize("dims", [(64, 64), (128, 128), (192, 128)], ids=str)
def test_gradients_of_other_groups_fit_hopper(group: int, dims: tuple[int, int]) -> None:
    with compiling_for("sm_90", only=FUNCTIONS["selected_backward"]) as builds:
        launch("selected_backward", *dims, torch.bfloat16, G=group)
    (build,) = builds
    assert build.stack <= A_FEW_SCALARS
    assert not faults(build)


@pytest.mark.parametrize("kernel", ["hopper_forward", "hopper_dq", "hopper_dkdv"])
@pytest.mark.parametrize("dims", [(64, 64), (128, 128), (192, 128)], ids=str)
def test_packed_sequences_fit_hopper(kernel: str, dims: tuple[int, int]) -> None:
    with compiling_for("sm_90", only=FUNCTIONS[kernel]) as builds:
        launch(kernel, *dims, torch.bfloat16, packed=True)
    (build,) = builds
    assert build.shared <= SHARED_MEMORY["sm_90"]
    # To clear rows, which few tiles need, the fetching warp has 24 registers.
    assert build.stack <= A_FEW_SCALARS + 8
    assert not faults(build)


@pytest.mark.parametrize("needs_grad", [True, False])
@pytest.mark.parametrize("group", [1, 16])
@pytest.mark.parametrize("dims", [(64, 64), (128, 128), (192, 128)], ids=str)
def test_the_gated_sum_fits_hopper(dims: tuple[int, int], group: int, needs_grad: bool) -> None:
    T, C = 320, CONFIG.num_compressed(320)
    q = torch.zeros(1, T, group, dims[0], dtype=torch.bfloat16)
    k_cmp, v_cmp, k, v = (q.new_zeros(1, rows, 1, dim) for rows in (C, T) for dim in dims)
    gates = q.new_zeros(1, T, group, 3)
    tail = (CONFIG, Layout(T), 0.1, needs_grad)
    with compiling_for("sm_90", only="_hopper_forward_kernel") as builds:
        kernels.nsa_attention(q, k_cmp, v_cmp, k, v, k, v, gates, *tail)
    for build in builds:
        assert build.shared <= SHARED_MEMORY["sm_90"]
        assert build.stack <= A_FEW_SCALARS
        assert not faults(build)


def test_an_arrival_right_after_an_access_is_found() -> None:
    access, arrival = "\tld.shared.b32 %r1, [%r2];", "\tmbarrier.arrive.shared::cta.b64 _, [%r3];"
    assert early_signals(f"{access}\n{arrival}") == [arrival.strip()]
    assert not early_signals(f"{access}\n\tbar.sync 1, 128;\n{arrival}")
    assert not early_signals(f"{access}\n\tcp.async.{arrival.strip()}")


ODD_DIMENSIONS = [(35, 35), (40, 24), (80, 96)]


@pytest.mark.parametrize("kernel", FUNCTIONS)
@pytest.mark.parametrize("dimensions", ODD_DIMENSIONS, ids=str)
def test_head_dimensions_between_entries_are_assembled_rightly(
    kernel: str, dimensions: tuple[int, int]
) -> None:
    with compiling_for("sm_90") as builds:
        launch(kernel, *dimensions, torch.float16)
    assert all(not faults(build) for build in builds)


@pytest.mark.parametrize("kernel", ["interval_forward", "selected_by_query"])
@pytest.mark.parametrize("dims", [(128, 128), (192, 128)], ids=str)
def test_what_splits_the_keys_of_few_queries_fits_hopper(
    kernel: str, dims: tuple[int, int]
) -> None:
    with compiling_for("sm_90") as builds:
        launch(kernel, *dims, torch.bfloat16, T=1)
    assert {build.name for build in builds} > {FUNCTIONS[kernel], "_merge_splits_kernel"}
    assert all(build.stack == 0 and not faults(build) for build in builds)


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The device functions that have been compiled."""
    names: list[str] = []

    def note(fn: Any, **rest: Any) -> None:
        names.append(fn.name)

    monkeypatch.setattr(knobs.runtime, "jit_post_compile_hook", note)
    return names


def test_a_new_length_compiles_nothing(compiled: list[str]) -> None:
    """Lengths, and the strides that follow from them, are no part of a kernel."""
    with compiling_for("sm_90"):
        for T in (1024, 1100):
            for kernel in FUNCTIONS:
                launch(kernel, 64, 64, torch.float16, T)
        assert compiled
        compiled.clear()
        launch("hopper_by_block", 64, 64, torch.float16)
        for T in (1101, 1537, 2048, 3000, 9000):
            for kernel in FUNCTIONS:
                launch(kernel, 64, 64, torch.float16, T)
    assert compiled == []


def test_a_cache_that_grows_compiles_nothing(compiled: list[str]) -> None:
    def decode(keys: int) -> None:
        q, lse = torch.zeros(1, 1, 4, 64), torch.zeros(1, 1, 4)
        k, k_cmp = (torch.zeros(1, S, 1, 64) for S in (keys, CONFIG.num_compressed(keys)))
        indices = torch.zeros(1, 1, 1, CONFIG.num_selected, dtype=torch.int32)
        tail = (CONFIG, Layout(keys), 0.1)
        kernels.compressed_attention(q, k_cmp, k_cmp, *tail)
        kernels.select_blocks(q, k_cmp, lse, *tail)
        kernels.selected_attention(q, k, k, indices, *tail)
        kernels.window_attention(q, k, k, *tail)

    with compiling_for("sm_90"):
        decode(1100)
        assert "_merge_splits_kernel" in "".join(compiled)
        compiled.clear()
        for keys in (1101, 1537, 2048, 9000, 70000):
            decode(keys)
    assert compiled == []
