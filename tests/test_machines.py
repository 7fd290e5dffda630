"""What is read of a machine, on made-up ones: AMD's GPUs as torch shows them, Tritons as pip leaves
them behind. What backends make of it, `test_registry.py` shows."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from nsa_port import environment, registry
from nsa_port.backends.cuda import CudaBackend
from nsa_port.backends.interface import Environment, Problem, TritonInfo
from nsa_port.backends.rocm import RocmBackend
from nsa_port.backends.torch import TorchBackend
from nsa_port.kernels import tables

PROBLEM = Problem("combine", torch.bfloat16, key_dim=128, value_dim=128)
BACKENDS = (CudaBackend(), RocmBackend(), TorchBackend())
KERNELS = tuple(tables.shipped_table(tables.GENERIC_AMD))


@dataclass(frozen=True)
class Wheel:
    """A distribution that brings the folder `triton`, with these compilers in it."""

    distribution: str
    version: str
    compilers: tuple[str, ...] = ("amd", "nvidia")


TRITON = Wheel("triton", "3.6.0")
FOR_NVIDIA = Wheel("triton", "3.6.0", ("nvidia",))
FOR_ROCM = Wheel("triton-rocm", "3.6.0")
AMDS_OWN = Wheel("triton", "3.6.0+rocm7.2.0.git20943800")
OLD = Wheel("pytorch-triton-rocm", "3.5.1")
STALE = Wheel("pytorch-triton-rocm", "2.1.0", ())

Gpu = Callable[..., Environment]


def install(site: Path, wheel: Wheel) -> None:
    """As pip does: over whatever is there already, of which the rest stays."""
    folder = site / "triton"
    for compiler in wheel.compilers:
        (folder / "backends" / compiler).mkdir(parents=True, exist_ok=True)
    folder.mkdir(exist_ok=True)
    (folder / "__init__.py").write_text(f'__version__ = "{wheel.version}"\n')
    record = site / f"{wheel.distribution.replace('-', '_')}-{wheel.version}.dist-info"
    record.mkdir()
    (record / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {wheel.distribution}\nVersion: {wheel.version}\n"
    )


def uninstall(site: Path, distribution: str) -> None:
    """As pip does: every file that it brought, whoever else brought the same."""
    shutil.rmtree(site / "triton")
    shutil.rmtree(next(site.glob(f"{distribution.replace('-', '_')}-*.dist-info")))


def found_in(site: Path) -> TritonInfo | None:
    """What is found where nothing but this folder of packages is searched."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delitem(sys.modules, "triton", raising=False)
        patch.setattr(sys, "path", [str(site)])
        importlib.invalidate_caches()
        environment.find_triton.cache_clear()
        found = environment.find_triton()
    environment.find_triton.cache_clear()
    return found


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Gpu:
    """Makes an AMD GPU as torch for ROCm shows it, beside wheels installed in this order."""

    def make(
        arch: str,
        *wheels: Wheel,
        units: int = 304,
        name: str = "AMD GPU",
        removed: tuple[str, ...] = (),
    ) -> Environment:
        properties = SimpleNamespace(name=name, gcnArchName=arch, multi_processor_count=units)
        for wheel in wheels:
            install(tmp_path, wheel)
        for distribution in removed:
            uninstall(tmp_path, distribution)
        triton = found_in(tmp_path)
        monkeypatch.setattr(torch.version, "hip", "6.4.43482")
        monkeypatch.setattr(torch.version, "cuda", None)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
        monkeypatch.setattr(environment, "find_triton", lambda: triton)
        return environment._probe.__wrapped__("cuda", 0, interpreter=False, emulate="")

    return make


def reasons(machine: Environment, backend: str) -> dict[str, str]:
    """Code and remedy of each reason against a backend when choice is automatic."""
    choice = registry.select(BACKENDS, machine, PROBLEM, None)
    return {reason.code: reason.remedy for reason in choice.reasons_against(backend)}


def runs_when_forced(machine: Environment) -> bool:
    return registry.select(BACKENDS, machine, PROBLEM, "rocm").backend is BACKENDS[1]


@pytest.mark.parametrize(
    ("name", "arch"),
    [
        ("gfx942:sramecc+:xnack-", "gfx942"),
        ("gfx90a:sramecc+:xnack-", "gfx90a"),
        ("gfx950:sramecc+:xnack-", "gfx950"),
        ("gfx1100", "gfx1100"),
        ("gfx1201", "gfx1201"),
    ],
)
def test_a_gpu_of_rocm_is_known_by_its_architecture_without_features(
    name: str, arch: str, gpu: Gpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = gpu(name, FOR_ROCM)
    assert (machine.arch, machine.hip_version) == (arch, "6.4.43482")
    assert set(reasons(machine, "rocm")) == {"not_conforming"}
    assert set(reasons(machine, "cuda")) == {"no_device"}
    assert runs_when_forced(machine)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="kernels need Triton")
def test_kernels_and_choice_name_a_gpu_alike(gpu: Gpu) -> None:
    from nsa_port.kernels.triton import host

    machine = gpu("gfx942:sramecc+:xnack-", FOR_ROCM)
    assert host._arch_of_device.__wrapped__(0) == machine.arch == "gfx942"


@pytest.mark.parametrize(("mode", "units"), [("SPX", 304), ("DPX", 152), ("QPX", 76), ("CPX", 38)])
def test_a_partition_of_chiplets_is_the_same_architecture(mode: str, units: int, gpu: Gpu) -> None:
    machine = gpu("gfx942:sramecc+:xnack-", FOR_ROCM, units=units, name="AMD Instinct MI300X")
    assert (machine.arch, machine.processors) == ("gfx942", units)
    assert set(reasons(machine, "rocm")) == {"not_conforming"}
    assert runs_when_forced(machine)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="kernels need Triton")
@pytest.mark.parametrize(
    ("product", "arch", "units", "dies"),
    [
        ("MI300X", "gfx942", 304, 8),
        ("MI300X in DPX", "gfx942", 152, 4),
        ("MI300X in QPX", "gfx942", 76, 2),
        ("MI300X in CPX", "gfx942", 38, 1),
        ("MI300A", "gfx942", 228, 6),
        ("MI308X", "gfx942", 80, 4),
        ("MI308X in CPX", "gfx942", 20, 1),
        ("MI355X", "gfx950", 256, 8),
        ("MI355X in CPX", "gfx950", 32, 1),
        ("of which nothing is known", "gfx950", 250, 1),
        ("MI250X, half of it", "gfx90a", 110, 1),
    ],
)
def test_work_is_placed_by_the_dies_that_the_device_has(
    product: str, arch: str, units: int, dies: int, gpu: Gpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nsa_port.kernels.amd import chips
    from nsa_port.kernels.triton import host

    machine = gpu(arch, FOR_ROCM, units=units, name=f"AMD Instinct {product}")
    monkeypatch.setattr(chips, "multiprocessors", host.multiprocessors.__wrapped__)  # no cache
    assert chips.dies_of(machine.arch, torch.device("cuda", 0)) == dies
    assert chips.dies_of(machine.arch, torch.device("cpu")) == chips.CHIPS[arch].dies


@pytest.mark.parametrize(
    "name", ["gfx1034", "gfx1030", "gfx908:sramecc+:xnack-", "gfx1151", "gfx9999", ""]
)
def test_a_gpu_without_a_table_is_told_so_and_takes_amds_generic_one(name: str, gpu: Gpu) -> None:
    machine = gpu(name, FOR_ROCM)
    assert set(reasons(machine, "rocm")) == {"arch_untuned", "not_conforming"}
    assert runs_when_forced(machine)
    if machine.arch:
        generic, nvidias = (tables.shipped_table(n) for n in (tables.GENERIC_AMD, tables.GENERIC))
        assert tables.shipped_table(machine.arch) == generic != nvidias
        for kernel in KERNELS:
            values = tables.tuned(machine.arch, kernel, 2, 128)
            assert values == tables.tuned(tables.GENERIC_AMD, kernel, 2, 128)


def test_a_consumer_card_is_taken_when_forced_with_its_own_table(gpu: Gpu) -> None:
    machine = gpu("gfx1100", FOR_ROCM, units=48, name="AMD Radeon RX 7900 XTX")
    assert set(reasons(machine, "rocm")) == {"not_conforming"}
    assert runs_when_forced(machine)
    assert tables.shipped_table("gfx1100") != tables.shipped_table(tables.GENERIC_AMD)


@pytest.mark.parametrize(
    ("wheels", "expected"),
    [
        ((FOR_ROCM,), set()),
        ((TRITON,), set()),
        ((AMDS_OWN,), set()),
        ((OLD,), {"triton_too_old"}),
        ((OLD, FOR_ROCM), set()),
        ((TRITON, OLD), {"triton_too_old", "triton_overwritten"}),
        ((TRITON, FOR_ROCM), set()),
        ((FOR_ROCM, TRITON), set()),
        ((FOR_NVIDIA, FOR_ROCM), set()),
        ((FOR_NVIDIA,), {"triton_lacks_compiler"}),
        ((TRITON, STALE), {"triton_too_old", "triton_overwritten"}),
        ((FOR_NVIDIA, STALE), {"triton_too_old", "triton_lacks_compiler", "triton_overwritten"}),
        ((STALE,), {"triton_too_old", "triton_lacks_compiler"}),
        ((STALE, TRITON), set()),
        ((STALE, FOR_NVIDIA), {"triton_lacks_compiler", "triton_overwritten"}),
        ((), {"triton_missing"}),
    ],
    ids=lambda value: (
        " ".join(f"{w.distribution}-{w.version}" for w in value) if isinstance(value, tuple) else ""
    ),
)
def test_the_triton_that_would_be_imported_decides_in_whatever_order_it_came(
    wheels: tuple[Wheel, ...], expected: set[str], gpu: Gpu
) -> None:
    machine = gpu("gfx942", *wheels)
    against = reasons(machine, "rocm")
    assert set(against) - {"not_conforming"} == expected
    assert runs_when_forced(machine) == (not expected)
    if "triton_overwritten" in expected:
        assert "pip uninstall -y triton pytorch-triton-rocm" in against["triton_overwritten"]


def test_a_triton_that_went_with_another_is_missed_and_reinstalled(gpu: Gpu) -> None:
    """pip still lists the other one, and would install nothing without the first half."""
    machine = gpu("gfx942", TRITON, FOR_ROCM, removed=("triton",))
    remedy = "pip uninstall -y triton-rocm && pip install nsa-port[rocm] --extra-index-url "
    index = "https://download.pytorch.org/whl/rocm6.4"
    assert reasons(machine, "rocm")["triton_missing"] == remedy + index
    assert not runs_when_forced(machine)


def test_each_wheel_that_brings_triton_is_named(tmp_path: Path) -> None:
    for wheel in (TRITON, FOR_ROCM):
        install(tmp_path, wheel)
    owners = ("triton", "triton-rocm")
    assert found_in(tmp_path) == TritonInfo("3.6.0", ("amd", "nvidia"), owners)
