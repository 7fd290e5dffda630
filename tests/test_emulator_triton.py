"""Real Triton kernels, compiled for each emulated GPU and run there."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch

from nsa_port import emulator
from nsa_port.emulator import ARCHITECTURES, DataRace, OutOfBounds, Session

from .emulator_programs import refuses

triton = pytest.importorskip("triton")

from triton.runtime.errors import OutOfResources  # noqa: E402

from nsa_port.emulator import report  # noqa: E402

from . import emulator_kernels as kernels  # noqa: E402

HALVES = [torch.float16, torch.bfloat16]


@pytest.fixture(params=ARCHITECTURES)
def gpu(request: pytest.FixtureRequest) -> Iterator[Session]:
    with emulator.emulated(request.param, measure=True) as session:
        yield session


def numbers(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def test_vectors_are_added(gpu: Session) -> None:
    x, y = numbers(1000), numbers(1000, seed=1)
    out = torch.full((1000,), math.nan)
    kernels.add[(4,)](x, y, out, 1000, BLOCK=256)
    assert torch.equal(out, x + y)
    assert gpu.launches[-1].name == "add"
    assert gpu.launches[-1].shape.workgroups == 4
    assert gpu.instructions == gpu.launches[-1].counters.instructions > 0


def test_softmax(gpu: Session) -> None:
    x = numbers(5, 300)
    out = torch.full_like(x, math.nan)
    kernels.softmax[(5,)](x, out, 300, BLOCK=512)
    torch.testing.assert_close(out, x.softmax(1))


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
def test_matrices_are_multiplied(gpu: Session, dtype: torch.dtype) -> None:
    m, n, k = 40, 48, 72
    a, b = numbers(m, k, dtype=dtype), numbers(k, n, dtype=dtype, seed=1)
    out = torch.full((m, n), math.nan)
    kernel = kernels.matmul[(2, 2)](a, b, out, m, n, k, BM=32, BN=32, BK=32, num_warps=4)
    torch.testing.assert_close(out, a.float() @ b.float(), rtol=1e-5, atol=1e-4)
    facts = report.inspect(kernel.asm["amdgcn"], kernel.metadata.shared)
    assert not facts.problems()
    if dtype != torch.float32 or gpu.architecture.generation == 9:
        assert facts.matrix_instructions
        assert report.report(gpu.launches[-1]).matrix > 0


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("stages", [1, 2])
def test_attention(gpu: Session, dtype: torch.dtype, stages: int) -> None:
    t, d = 80, 64
    q, k, v = (numbers(t, d, dtype=dtype, seed=seed) for seed in range(3))
    out = torch.full_like(q, math.nan)
    scale = d**-0.5 / math.log(2)
    kernels.attention[(3,)](q, k, v, out, t, scale, D=d, BM=32, BN=32, num_stages=stages)
    scores = (q.double() @ k.double().T) * d**-0.5
    scores = scores.masked_fill(torch.ones(t, t).triu(1).bool(), -math.inf)
    expected = scores.softmax(1) @ v.double()
    # The weights are rounded to the tensors' type, then the result is.
    slack = 4 * torch.finfo(dtype).eps * v.abs().max().item()
    assert (out.double() - expected).abs().max() < slack


def test_sums_by_atomics(gpu: Session) -> None:
    x, out = numbers(4, 256), torch.zeros(256)
    kernels.column_sums[(4,)](x, out, BLOCK=256)
    torch.testing.assert_close(out, x.sum(0))


def test_integer_atomics_return_what_they_found(gpu: Session) -> None:
    counter, out = torch.zeros(3, dtype=torch.int32), torch.zeros(20, dtype=torch.int32)
    kernels.tickets[(20,)](counter, out)
    assert sorted(out.tolist()) == list(range(20))
    assert counter.tolist() == [20, 19, 7]


def test_a_kernel_knows_its_grid(gpu: Session) -> None:
    out = torch.zeros(2 * 3 * 4, dtype=torch.int32)
    kernels.grid_sizes[(2, 3, 4)](out)
    assert (out == 432).all()


def test_scans_sorts_and_integer_division(gpu: Session) -> None:
    n, block = 100, 128
    x = numbers(n)
    out = torch.full((3 * block + 1,), math.nan)
    kernels.scans[(1,)](x, out, n, BLOCK=block)
    padded = torch.cat([x, torch.full((block - n,), -1e9)])
    i = torch.arange(block)
    torch.testing.assert_close(out[:n], x.cumsum(0), rtol=1e-5, atol=1e-5)
    assert torch.equal(out[block : 2 * block], padded.sort().values)
    assert out[2 * block] == x.argmax()
    assert torch.equal(out[2 * block + 1 :], ((i * 7919) // (n % 13 + 3) + i % (n % 7 + 2)).float())


@pytest.mark.parametrize("dtype", [*HALVES, torch.int32, torch.float64], ids=str)
def test_casts(gpu: Session, dtype: torch.dtype) -> None:
    x = numbers(512) * 100
    out = torch.zeros(512, dtype=dtype)
    kernels.cast[(1,)](x, out, BLOCK=512)
    assert torch.equal(out, x.to(dtype))


def test_a_racy_kernel_is_caught(gpu: Session) -> None:
    x, out = numbers(4, 256), torch.zeros(256)
    with refuses(DataRace, "argument", "source line"):
        kernels.racy_column_sums[(4,)](x, out, BLOCK=256)


def test_an_out_of_bounds_kernel_is_caught(gpu: Session) -> None:
    x, y, out = numbers(1000), numbers(1000), torch.zeros(1000)
    with refuses(OutOfBounds, "4000 bytes", "workgroup", "in `"):
        kernels.add_without_mask[(4,)](x, y, out, 1000, BLOCK=256)


def test_views_share_their_storage(gpu: Session) -> None:
    storage = numbers(2048)
    before = storage.clone()
    kernels.add[(1,)](storage[64:], storage[1024:], storage[1536:], 100, BLOCK=128)
    assert torch.equal(storage[1536:1636], before[64:164] + before[1024:1124])
    storage[1536:1636] = before[1536:1636]
    assert torch.equal(storage, before)


def test_a_view_without_elements_is_a_null_pointer(gpu: Session) -> None:
    x, out = numbers(256), torch.full((256,), math.nan)
    kernels.add[(1,)](x, x[:0], out, 0, BLOCK=256)
    assert out.isnan().all()


def test_a_report_has_the_traffic(gpu: Session) -> None:
    x, y, out = numbers(512), numbers(512), torch.zeros(512)
    kernels.add[(2,)](x, y, out, 512, BLOCK=256)
    found = report.report(gpu.launches[-1])
    arguments = 512  # at most, of the argument buffer
    assert 3 * 2048 <= (found.bytes_moved or 0) <= 3 * 2048 + arguments
    assert found.bytes_unique == 3 * 2048
    assert found.reuse == pytest.approx(1.0)
    assert found.instructions == sum(found.by_class.values())
    assert (found.matrix, found.matrix_share, found.lds_passes) == (0, 0.0, 0)


def test_one_kernel_runs_on_every_gpu_in_turn() -> None:
    """Triton keeps the compiled kernels of the emulated GPUs apart."""
    for name in [*ARCHITECTURES, *ARCHITECTURES]:
        x, out = numbers(2, 64), torch.zeros(2, 64)
        with emulator.emulated(name) as session:
            kernels.softmax[(2,)](x, out, 64, BLOCK=64)
        assert session.launches[-1].program.architecture.name == name
        torch.testing.assert_close(out, x.softmax(1))


def test_the_previous_driver_comes_back() -> None:
    outer = emulator.activate("gfx942")
    with emulator.emulated("gfx1100"):
        assert triton.runtime.driver.active.get_current_target().arch == "gfx1100"
    assert triton.runtime.driver.active.session is outer
    emulator.deactivate()
    emulator.deactivate()
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="active drivers"):
            _ = triton.runtime.driver.active


def test_the_session_in_use_is_kept() -> None:
    with emulator.emulated("gfx942") as session:
        with emulator.using("gfx942") as same:
            assert same is session
        with emulator.using("gfx1100") as other, emulator.using("gfx1100") as again:
            assert other.architecture.name == "gfx1100"
            assert again is other
        assert triton.runtime.driver.active.session is session


def test_autotuning_goes_by_executed_instructions() -> None:
    configurations = [triton.Config({"BLOCK": block}, num_warps=1) for block in (64, 512)]
    tuned = triton.autotune(configurations, key=["n"])(kernels.add)
    x, y, out = numbers(512), numbers(512), torch.zeros(512)
    with emulator.emulated("gfx942"):
        tuned[lambda meta: (triton.cdiv(512, meta["BLOCK"]),)](x, y, out, 512)
    assert torch.equal(out, x + y)
    assert tuned.best_config.kwargs["BLOCK"] == 512


def test_tensors_must_be_on_the_cpu() -> None:
    x = torch.zeros(64, device="meta")
    with emulator.emulated("gfx942"), pytest.raises(emulator.EmulatorError, match="CPU tensors"):
        kernels.add[(1,)](x, x, x, 64, BLOCK=64)


def test_an_architecture_without_an_emulator_is_refused_with_the_list() -> None:
    with pytest.raises(ValueError, match=r"gfx803.*gfx90a, gfx942, gfx950"):
        emulator.activate("gfx803")


def test_a_kernel_that_needs_too_much_lds_is_refused() -> None:
    """The compiler does not check; the driver tells Triton the limit."""
    a = numbers(128, 256, dtype=torch.float16)
    out = torch.zeros(128, 128)
    options = {"BM": 128, "BN": 128, "BK": 128, "num_stages": 3, "num_warps": 4}
    with emulator.emulated("gfx942"), pytest.raises(OutOfResources, match="shared memory"):
        kernels.matmul[(1, 1)](a, a, out, 128, 128, 256, **options)
