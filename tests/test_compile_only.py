"""Compiling without a GPU: what is launched is built for the architecture, and never run."""

from __future__ import annotations

import pytest
import torch

triton = pytest.importorskip("triton")

from triton.runtime.errors import OutOfResources  # noqa: E402

from nsa_port.tune.compile_only import SHARED_MEMORY, compiling_for  # noqa: E402

from . import emulator_kernels as kernels  # noqa: E402


def multiply() -> None:
    a = torch.zeros(32, 32, dtype=torch.float16)
    kernels.matmul[(1, 1)](a, a, a.float(), 32, 32, 32, BM=32, BN=32, BK=32, num_warps=2)


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "gfx90a", "gfx942", "gfx1100"])
def test_what_was_built_is_known(arch: str) -> None:
    with compiling_for(arch) as builds:
        multiply()
    (build,) = builds
    assert (build.name, build.num_warps, build.stack) == ("matmul", 2, 0)
    assert build.registers > 0
    assert 0 < build.shared <= SHARED_MEMORY[arch]
    assert (".target sm_" in build.assembly) == arch.startswith("sm_")
    assert build.binary.startswith(b"\x7fELF")


def test_what_needs_too_much_shared_memory_is_refused() -> None:
    with compiling_for("sm_90", shared_memory=1024), pytest.raises(OutOfResources):
        multiply()


def test_the_driver_before_is_back_afterwards() -> None:
    before = triton.runtime.driver._active
    with compiling_for("sm_90"):
        assert triton.runtime.driver._active is not before
    assert triton.runtime.driver._active is before


def test_one_kernel_alone_is_compiled_where_only_it_is_wanted() -> None:
    with compiling_for("sm_90", only="another") as builds:
        multiply()
    assert builds == []
    with compiling_for("sm_90", only="matmul") as builds:
        multiply()
    assert [build.name for build in builds] == ["matmul"]
