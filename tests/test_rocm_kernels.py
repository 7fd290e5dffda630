"""What AMD's own kernels promise beyond what holds for every operator: reach, placement, counts."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from torch import Tensor

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

from nsa_port import emulator, reference
from nsa_port.emulator.architectures import ARCHITECTURES
from nsa_port.emulator.report import Compiled, inspect
from nsa_port.kernels import amd
from nsa_port.kernels import triton as shared
from nsa_port.kernels.amd import selected, selection
from nsa_port.kernels.amd.chips import CHIPS, lanes_of
from nsa_port.kernels.amd.placement import workgroups
from nsa_port.kernels.geometry import Layout, NSAConfig
from nsa_port.tune.compile_only import compiling_for
from tests.rocm_calls import Shape, calls

CONFIG = NSAConfig(num_selected=4)
REACH = 2**31
"""Bytes from its base that a buffer instruction's 32-bit offset is trusted with."""


def tail_of(storage: Tensor, *shape: int) -> Tensor:
    """A bfloat16 tensor in the last bytes of a storage."""
    size = 2 * torch.Size(shape).numel()
    return storage[-size:].view(torch.bfloat16).view(shape)


def inputs(storage: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`q, k, v, indices` of a few queries; `k` lies at the end of the storage."""
    T, S, G, D = 4, 256, 16, 64
    torch.manual_seed(0)
    k = tail_of(storage, 1, S, 1, D)
    k.copy_(torch.randn(k.shape))
    q, v = (torch.randn(1, *size, D).to(torch.bfloat16) for size in ((T, G), (S, 1)))
    indices = torch.arange(4, dtype=torch.int32).expand(1, T, 1, 4).contiguous()
    return q, k, v, indices


def compiled(arch: str, operator: str, storage: Tensor) -> Compiled:
    """The device function that does the operator's work."""
    q, k, v, indices = inputs(storage)
    tail = (CONFIG, Layout(k.shape[1]), 0.1)
    with compiling_for(arch) as builds:
        if operator == "window":
            amd.window_attention(q, k, v, *tail)
        else:
            amd.selected_attention(q, k, v, indices, *tail)
    names = ("_interval_forward_kernel", "_by_wave_kernel")
    build = next(build for build in builds if build.name in names)
    return inspect(build.assembly, build.shared)


def test_only_storages_beyond_2_gib_are_read_by_global_loads() -> None:
    near = compiled("gfx942", "window", torch.empty(REACH - 2, dtype=torch.uint8))
    far = compiled("gfx942", "window", torch.empty(REACH, dtype=torch.uint8))
    assert near.buffer_loads > 0 == near.global_loads
    assert far.global_loads > 0


def test_one_wave_reads_any_storage_by_buffer_loads() -> None:
    """It moves the base, so that no offset is large."""
    far = compiled("gfx942", "selected", torch.empty(REACH, dtype=torch.uint8))
    assert far.buffer_loads > 0 == far.global_loads


@pytest.mark.parametrize("operator", ["window", "selected"])
def test_storages_beyond_2_gib_are_read_rightly(operator: str) -> None:
    q, k, v, indices = inputs(torch.empty(REACH + 2**20, dtype=torch.uint8))
    tail = (CONFIG, Layout(k.shape[1]), 0.1)
    wide = (q.double(), k.double(), v.double())
    with emulator.emulated("gfx942"):
        if operator == "window":
            out, _ = amd.window_attention(q, k, v, *tail)
            exact, _ = reference.window_attention(*wide, CONFIG, scale=0.1)
        else:
            out, _ = amd.selected_attention(q, k, v, indices, *tail)
            exact, _ = reference.selected_attention(*wide, indices, CONFIG, scale=0.1)
    assert (out - exact).abs().max() < 4 * torch.finfo(torch.bfloat16).eps * v.abs().max()


def test_strides_beyond_a_buffer_instruction_go_to_the_shared_kernel() -> None:
    q, k, v, indices = inputs(torch.empty(2 * REACH, dtype=torch.uint8))
    far = k.as_strided(k.shape, (0, 2**23, 0, 1), 0)
    with compiling_for("gfx942") as builds:
        amd.selected_attention(q, far, v, indices, CONFIG, Layout(k.shape[1]), 0.1)
    assert "_by_query_kernel" in [build.name for build in builds]


@pytest.mark.parametrize("items", [1, 7, 8, 9, 1000])
@pytest.mark.parametrize("dies", [1, 2, 6, 8])
def test_every_item_is_taken_once_and_a_die_takes_neighbours(items: int, dies: int) -> None:
    """`placement.item_of`, spelled out."""
    count = workgroups(items, dies)
    each = -(-items // dies)
    taken = [w % dies * each + w // dies for w in range(count)]
    assert sorted(item for item in taken if item < items) == list(range(items))
    for die in range(dies):
        mine = [taken[w] for w in range(die, count, dies)]
        assert mine == list(range(mine[0], mine[0] + each))


@pytest.mark.parametrize("group", [4, 16])
def test_the_number_of_dies_changes_no_bit(group: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As of MI300X, whole and in partitions, and of MI300A."""
    results = []
    for dies in (8, 6, 2, 1):
        monkeypatch.setattr(selected, "dies_of", lambda arch, device, dies=dies: dies)
        with emulator.emulated("gfx942") as session:
            shape = Shape(queries=67, keys=256, group=group, key_dim=32, value_dim=32)
            results.append(calls(amd, shape)["selected"]())
        launched = session.launches[-1]
        assert launched.name == ("_by_tile_kernel" if group == 4 else "_by_wave_kernel")
        assert launched.shape.grid[0] % dies == 0
    for out, lse in results[1:]:
        assert torch.equal(out, results[0][0])
        assert torch.equal(lse, results[0][1])


@pytest.mark.parametrize(("arch", "tenths"), [("gfx90a", 7), ("gfx942", 8), ("gfx950", 9)])
def test_one_wave_executes_fewer_instructions_than_the_shared_kernel(
    arch: str, tenths: int
) -> None:
    """Tiles of 64 keys, seven tenths at most, spill with triton 3.9 on gfx942 and gfx950."""
    shape = Shape(queries=16, keys=1024)  # as many as are not split
    counts = []
    for module in (amd, shared):
        with emulator.emulated(arch) as session:
            calls(module, shape)["selected"]()
        counts.append(session.launches[-1].counters.instructions)
    assert counts[0] * 10 <= counts[1] * tenths


def equal_scores(keys: int, queries: int, dim: int = 16) -> tuple[Tensor, Tensor, Tensor]:
    """`q, k_cmp, lse` of few distinct numbers, so that many blocks score the same."""
    torch.manual_seed(keys)
    q = torch.randn(1, queries, 2, dim).round()
    k_cmp = torch.randn(1, CONFIG.num_compressed(keys), 1, dim).round().clamp(0, 1)
    return q, k_cmp, torch.full((1, queries, 2), 3.0)


@pytest.mark.parametrize(
    ("keys", "held"), [(1000, 32), (5000, 32), (40000, 32), (15000, 2)], ids="{}".format
)
@pytest.mark.parametrize("arch", ["gfx942", "gfx1100"])
def test_the_choice_is_the_shared_kernels_where_blocks_tie(
    arch: str, keys: int, held: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of one lane, of several, of a whole wave, and of twice as many blocks to a lane."""
    monkeypatch.setattr(selection, "_HELD", held * 64 // lanes_of(arch))
    q, k_cmp, lse = equal_scores(keys, queries=3)
    chosen = []
    for module in (amd, shared):
        with emulator.emulated(arch):
            chosen.append(module.select_blocks(q, k_cmp, lse, CONFIG, Layout(keys), 0.3))
    assert torch.equal(*chosen)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_choice_executes_a_quarter_of_the_shared_kernels_instructions_at_most(
    arch: str,
) -> None:
    counts = []
    for module in (amd, shared):
        with emulator.emulated(arch) as session:
            calls(module, Shape(queries=64, keys=2048, group=1, key_dim=16))["select"]()
        counts.append(session.launches[-1].counters.instructions)
    assert counts[0] * 4 <= counts[1]


@pytest.mark.parametrize("keys", [2048, 9000, None], ids=["one_lane", "some_lanes", "widest"])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_choice_stays_in_registers(arch: str, keys: int | None) -> None:
    keys = keys or 2 * selection._HELD * lanes_of(arch) * CONFIG.select_block_size
    q, k_cmp, lse = equal_scores(keys, queries=1)
    with compiling_for(arch) as builds:
        amd.select_blocks(q, k_cmp, lse, NSAConfig(), Layout(keys), 0.3)
    facts = inspect(builds[-1].assembly, builds[-1].shared)
    assert facts.problems() == ()
    assert facts.lds_bytes == 0


@pytest.mark.parametrize("group", [1, 2, 3, 8])
def test_neighbouring_queries_share_a_wave_and_none_sees_anothers_blocks(group: int) -> None:
    """Few keys, so that they share many blocks; the first sees nothing and holds no numbers."""
    torch.manual_seed(group)
    config = NSAConfig(16, 8, 16, 4)
    T, S, HK, D = 37, 200, 5, 32
    q, k, v = torch.randn(1, T, HK * group, D), torch.randn(1, S, HK, D), torch.randn(1, S, HK, D)
    position = torch.arange(T)[None] + S - T
    position[0, 0] = -1
    order = torch.rand(1, T, HK, 13).argsort(-1)[..., :4].sort(-1).values.to(torch.int32)
    wide = (q.double(), k.double(), v.double(), order)
    exact, exact_lse = reference.selected_attention(*wide, config, scale=0.2, positions=position)
    q[0, 0] = float("nan")
    with emulator.emulated("gfx942") as session:
        out, lse = amd.selected_attention(
            q, k, v, order, config, Layout(S, positions=position), 0.2
        )
    assert session.launches[-1].name == "_by_tile_kernel"
    torch.testing.assert_close(out.double(), exact, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse.double(), exact_lse.double(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("arch", CHIPS)
def test_a_wave_of_neighbours_executes_half_of_the_shared_kernels_instructions_at_most(
    arch: str,
) -> None:
    counts = []
    for module in (amd, shared):
        with emulator.emulated(arch) as session:
            calls(module, Shape(queries=64, keys=1024, group=4))["selected"]()
        counts.append(sum(launch.counters.instructions for launch in session.launches))
    assert counts[0] * 2 <= counts[1]
