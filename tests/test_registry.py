"""Selection is a pure function: every machine here is made up."""

from __future__ import annotations

import importlib.metadata
import re
import sys
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import replace
from types import ModuleType, SimpleNamespace

import pytest
import torch

import nsa_port
from nsa_port import emulator, environment, registry, settings
from nsa_port.backends.cuda import CudaBackend
from nsa_port.backends.interface import (
    Backend,
    Environment,
    Problem,
    Reason,
    TritonInfo,
)
from nsa_port.backends.rocm import ARCHITECTURES, RocmBackend
from nsa_port.backends.torch import TorchBackend
from nsa_port.kernels import tables

BOTH = ("amd", "nvidia")
H200 = Environment(
    device_type="cuda",
    device_name="NVIDIA H200",
    arch="sm_90",
    cuda_version="13.0",
    shared_memory=232448,
    processors=132,
    triton=TritonInfo("3.6.0", BOTH, ("triton",)),
)
MI300X = Environment(
    device_type="cuda",
    device_name="AMD Instinct MI300X",
    arch="gfx942",
    hip_version="6.4",
    processors=304,
    triton=TritonInfo("3.6.0", BOTH, ("triton-rocm",)),
)
MACHINES = {
    "h200": H200,
    "mi300x": MI300X,
    "mi300x in a chiplet partition": replace(MI300X, processors=38),
    "mi250, old triton": replace(
        MI300X,
        device_name="AMD Instinct MI250X",
        arch="gfx90a",
        triton=TritonInfo("2.1.0", BOTH, ("pytorch-triton-rocm",)),
    ),
    "radeon": replace(MI300X, device_name="AMD Radeon RX 7900 XTX", arch="gfx1100"),
    "unknown gfx": replace(MI300X, device_name="AMD Radeon RX 6400", arch="gfx1034"),
    "amd, no triton": replace(MI300X, triton=None),
    "amd, nvidia's triton": replace(MI300X, triton=TritonInfo("3.6.0", ("nvidia",), ("triton",))),
    "nvidia, no triton": replace(H200, triton=None),
    "old nvidia": replace(H200, device_name="Tesla V100-SXM2-16GB", arch="sm_70"),
    "calls itself cuda": replace(
        H200, device_name="MXC500", arch="sm_80", triton=TritonInfo("3.0.0", ("metax",))
    ),
    "ascend": Environment(
        device_type="npu",
        device_name="Ascend910B3",
        triton=TritonInfo("3.2.0", ("ascend",), ("triton-ascend",)),
    ),
    "intel": Environment(
        device_type="xpu", device_name="Intel Data Center GPU Max", triton=TritonInfo("3.6.0", ())
    ),
    "mac": Environment(device_type="mps", device_name="mps"),
    "cpu": Environment(triton=TritonInfo("3.6.0", BOTH, ("triton",))),
    "cpu, interpreter": Environment(
        triton=TritonInfo("3.6.0", BOTH, ("triton",)), interpreter=True
    ),
    "cpu, emulator": Environment(triton=TritonInfo("3.6.0", BOTH, ("triton",)), emulate="gfx942"),
    "cpu, emulator without numpy": Environment(
        triton=TritonInfo("3.6.0", BOTH, ("triton",)), emulate="gfx942", numpy=False
    ),
    "cpu, emulator without triton": Environment(emulate="gfx942"),
    "cpu, emulator of an old gpu": Environment(
        triton=TritonInfo("3.6.0", BOTH, ("triton",)), emulate="gfx803"
    ),
    "cpu, emulator and interpreter": Environment(
        triton=TritonInfo("3.6.0", BOTH, ("triton",)), emulate="gfx942", interpreter=True
    ),
    "two tritons": replace(
        MI300X, triton=TritonInfo("3.6.0", ("nvidia",), ("triton", "pytorch-triton-rocm"))
    ),
}


def proven(backend: CudaBackend | RocmBackend) -> Backend:
    """The backend as if the suite had passed on its hardware, so that only the machine decides."""
    nvidia = {found.arch for found in MACHINES.values() if found.arch.startswith("sm_")}
    backend.conforming = nvidia if isinstance(backend, CudaBackend) else ARCHITECTURES
    return backend


BACKENDS: tuple[Backend, ...] = (
    proven(CudaBackend()),
    proven(RocmBackend()),
    TorchBackend(),
)
PROBLEM = Problem(
    operator="selected_attention",
    dtype=torch.bfloat16,
    num_queries=8192,
    num_keys=8192,
    heads=64,
    kv_heads=4,
    key_dim=192,
    value_dim=128,
    shapes=(("q", (1, 8192, 64, 192)), ("k", (1, 8192, 4, 192))),
)


def codes(machine: str, backend: str, problem: Problem = PROBLEM) -> set[str]:
    choice = registry.select(BACKENDS, MACHINES[machine], problem, None)
    return {reason.code for reason in choice.reasons_against(backend)}


@pytest.mark.parametrize(
    ("machine", "expected", "passed_over"),
    [
        ("h200", "cuda", ()),
        ("mi300x", "rocm", ()),
        ("mi300x in a chiplet partition", "rocm", ()),
        ("mi250, old triton", "torch", ("rocm",)),
        ("radeon", "rocm", ()),
        ("unknown gfx", "torch", ("rocm",)),
        ("amd, no triton", "torch", ("rocm",)),
        ("amd, nvidia's triton", "torch", ("rocm",)),
        ("nvidia, no triton", "torch", ("cuda",)),
        ("old nvidia", "torch", ("cuda",)),
        ("calls itself cuda", "torch", ()),
        ("ascend", "torch", ()),
        ("intel", "torch", ()),
        ("mac", "torch", ()),
        ("cpu", "torch", ()),
        ("cpu, interpreter", "torch", ()),
        ("cpu, emulator", "torch", ()),
        ("two tritons", "torch", ("rocm",)),
    ],
)
def test_automatic_choice_on_each_machine(
    machine: str, expected: str, passed_over: tuple[str, ...]
) -> None:
    choice = registry.select(BACKENDS, MACHINES[machine], PROBLEM, None)
    assert choice.backend is not None
    assert (choice.backend.name, choice.passed_over) == (expected, passed_over)


@pytest.mark.parametrize(
    ("machine", "backend", "expected"),
    [
        ("h200", "rocm", {"no_device"}),
        ("h200", "torch", {"not_chosen"}),
        ("mi300x", "cuda", {"no_device"}),
        ("mi250, old triton", "rocm", {"triton_too_old"}),
        ("unknown gfx", "rocm", {"arch_untuned", "not_conforming"}),
        ("amd, no triton", "rocm", {"triton_missing"}),
        ("amd, nvidia's triton", "rocm", {"triton_lacks_compiler"}),
        ("cpu", "rocm", {"no_device"}),
        ("ascend", "rocm", {"no_device", "triton_too_old", "triton_lacks_compiler"}),
        ("calls itself cuda", "rocm", {"no_device", "triton_too_old", "triton_lacks_compiler"}),
        ("cpu, emulator", "rocm", {"not_chosen"}),
        ("cpu, emulator", "cuda", {"no_device"}),
        ("cpu, emulator without numpy", "rocm", {"numpy_missing"}),
        ("cpu, emulator without triton", "rocm", {"triton_missing"}),
        ("cpu, emulator of an old gpu", "rocm", {"arch_not_emulated"}),
        (
            "cpu, emulator and interpreter",
            "rocm",
            {"emulated_and_interpreted", "dtype_unsupported"},
        ),
        ("cpu, interpreter", "rocm", {"dtype_unsupported"}),
        ("nvidia, no triton", "cuda", {"triton_missing"}),
        ("old nvidia", "cuda", {"arch_too_old"}),
        (
            "calls itself cuda",
            "cuda",
            {"device_not_nvidia", "triton_too_old", "triton_lacks_compiler"},
        ),
        ("ascend", "cuda", {"no_device", "triton_too_old", "triton_lacks_compiler"}),
        ("mac", "cuda", {"no_device", "triton_missing"}),
        ("two tritons", "rocm", {"triton_lacks_compiler", "triton_overwritten"}),
        ("cpu, interpreter", "cuda", {"dtype_unsupported"}),
    ],
)
def test_all_reasons_against_a_backend_are_given(
    machine: str, backend: str, expected: set[str]
) -> None:
    assert codes(machine, backend) == expected


def test_an_nvidia_gpu_on_which_the_suite_never_passed_is_taken_only_when_forced() -> None:
    backends = (CudaBackend(), TorchBackend())
    assert registry.select(backends, H200, PROBLEM, None).backend is backends[0]
    blackwell = replace(H200, arch="sm_100")
    automatic = registry.select(backends, blackwell, PROBLEM, None)
    assert automatic.backend is backends[1]
    assert [why.code for why in automatic.reasons_against("cuda")] == ["not_conforming"]
    assert registry.select(backends, blackwell, PROBLEM, "cuda").backend is backends[0]


@pytest.mark.parametrize(("machine", "backend"), [("h200", "cuda"), ("mi300x", "rocm")])
def test_head_dimensions_past_the_kernels_tiles_are_refused(machine: str, backend: str) -> None:
    choice = registry.select(BACKENDS, MACHINES[machine], replace(PROBLEM, key_dim=320), backend)
    (reason,) = choice.reasons_against(backend)
    assert (reason.code, reason.value) == ("head_dim_too_large", "320")


@pytest.mark.parametrize("machine", ["mi300x", "mi300x in a chiplet partition", "radeon"])
def test_an_amd_gpu_on_which_the_suite_never_passed_is_taken_only_when_forced(machine: str) -> None:
    backends = (RocmBackend(), TorchBackend())
    automatic = registry.select(backends, MACHINES[machine], PROBLEM, None)
    assert automatic.backend is backends[1]
    assert automatic.passed_over == ("rocm",)
    assert [why.code for why in automatic.reasons_against("rocm")] == ["not_conforming"]
    assert registry.select(backends, MACHINES[machine], PROBLEM, "rocm").backend is backends[0]


def test_an_unknown_gfx_runs_when_forced_with_the_generic_table() -> None:
    choice = registry.select(BACKENDS, MACHINES["unknown gfx"], PROBLEM, "rocm")
    assert choice.backend is BACKENDS[1]
    generic = tables.tuned(tables.GENERIC_AMD, "interval_forward", 2, 128)
    assert tables.tuned("gfx1034", "interval_forward", 2, 128) == generic
    assert tables.tuned("sm_90", "interval_forward", 2, 128) != generic


def test_forcing_overrides_no_reason_that_is_not_soft() -> None:
    machine = replace(MACHINES["unknown gfx"], triton=None)
    choice = registry.select(BACKENDS, machine, PROBLEM, "rocm")
    assert choice.backend is None
    assert [why.code for why in choice.reasons_against("rocm")] == ["triton_missing"]


def test_a_call_on_an_unproven_gpu_warns_and_says_how_to_force(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(registry, "_told", set())
    monkeypatch.setattr(environment, "probe", lambda device: MACHINES["mi300x"])
    with pytest.warns(nsa_port.NSAPortWarning, match="backend='rocm'"):
        combine()
    forced = registry.choose(replace(PROBLEM, operator="combine"), torch.device("cpu"), "rocm")
    assert forced.name == "rocm"


def test_a_backend_with_soft_reasons_alone_is_listed_as_available_when_forced(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(environment, "probe", lambda device: MACHINES["unknown gfx"])
    rocm = {status.name: status for status in nsa_port.backends()}["rocm"]
    assert rocm.available
    assert [why.code for why in rocm.reasons] == ["arch_untuned", "not_conforming"]
    assert "when forced" in str(rocm)
    assert "backend='rocm'" in str(rocm)


@pytest.mark.parametrize(
    ("name", "arch"), [("gfx942:sramecc+:xnack-", "gfx942"), ("gfx1100", "gfx1100")]
)
def test_an_amd_architecture_is_told_without_its_features(
    name: str, arch: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Partitions (CPX, NPS4) change the compute units and the memory, never this name."""
    properties = SimpleNamespace(
        name="AMD Instinct MI300X", gcnArchName=name, multi_processor_count=38
    )
    monkeypatch.setattr(torch.version, "hip", "6.4")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    probe = environment._probe.__wrapped__
    found = probe("cuda", 0, interpreter=False, emulate="")
    assert (found.arch, found.processors) == (arch, 38)


def test_what_rocm_lists_is_what_is_emulated() -> None:
    assert tuple(emulator.ARCHITECTURES) == ARCHITECTURES


def test_every_reason_has_a_value_a_bound_and_a_remedy() -> None:
    for machine in MACHINES.values():
        for name, reasons in registry.select(BACKENDS, machine, PROBLEM, None).rejected:
            for reason in reasons:
                assert reason.remedy, (name, reason)
                assert reason.code == "not_chosen" or (reason.value and reason.bound), reason


@pytest.mark.parametrize(
    ("machine", "backend"),
    [
        ("cpu, interpreter", "cuda"),
        ("cpu, interpreter", "rocm"),
        ("cpu, emulator", "rocm"),
    ],
)
def test_what_stands_in_for_hardware_is_taken_only_when_forced(machine: str, backend: str) -> None:
    problem = replace(PROBLEM, dtype=torch.float32)
    automatic = registry.select(BACKENDS, MACHINES[machine], problem, None)
    forced = registry.select(BACKENDS, MACHINES[machine], problem, backend)
    assert automatic.backend is not None
    assert automatic.backend.name == "torch"
    assert automatic.passed_over == ()
    assert forced.backend is not None
    assert forced.backend.name == backend


def test_emulation_takes_bfloat16_and_interpretation_does_not() -> None:
    assert codes("cpu, emulator", "rocm") == {"not_chosen"}
    assert codes("cpu, interpreter", "rocm") == {"dtype_unsupported"}


def test_emulating_an_unknown_architecture_is_refused_with_the_list() -> None:
    choice = registry.select(BACKENDS, MACHINES["cpu, emulator of an old gpu"], PROBLEM, "rocm")
    (reason,) = choice.reasons_against("rocm")
    assert (reason.code, reason.value) == ("arch_not_emulated", "gfx803")
    assert "gfx942" in reason.bound


def test_a_gpu_is_never_emulated_whatever_the_variable_says() -> None:
    """Its tensors run on the GPU: `NSA_PORT_EMULATE` is for CPU tensors."""
    machine = replace(MI300X, emulate="gfx90a")
    assert environment.emulated_architecture("rocm", machine) == ""
    assert registry.select(BACKENDS, machine, PROBLEM, "rocm").backend is BACKENDS[1]
    cpu = MACHINES["cpu, emulator"]
    assert environment.emulated_architecture("rocm", cpu) == "gfx942"
    assert environment.emulated_architecture("cuda", cpu) == ""


def test_a_wrong_architecture_fails_the_forced_call_with_the_list(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("NSA_PORT_EMULATE", "gfx94")
    with pytest.raises(nsa_port.BackendUnavailable, match=r"gfx94 names no.*gfx90a, gfx942"):
        combine("rocm")


def test_forced_backend_never_falls_back() -> None:
    choice = registry.select(BACKENDS, MACHINES["cpu"], PROBLEM, "cuda")
    assert choice.backend is None


def test_forced_failure_names_shapes_and_every_reason() -> None:
    q = torch.randn(1, 64, 4, 16)
    with pytest.raises(nsa_port.BackendUnavailable) as caught:
        nsa_port.window_attention(q, q[:, :, :2], q[:, :, :2], nsa_port.NSAConfig(), backend="cuda")
    text = str(caught.value)
    assert "window_attention(q [1, 64, 4, 16]" in text
    assert "float32" in text
    assert "[no_device]" in text
    assert "remedy:" in text
    assert "torch:" not in text


@pytest.mark.parametrize(
    ("text", "operator", "expected"),
    [
        ("", "combine", None),
        ("torch", "combine", "torch"),
        ("cuda,select_blocks=torch", "select_blocks", "torch"),
        ("cuda,select_blocks=torch", "window_attention", "cuda"),
        ("select_blocks=torch", "window_attention", None),
        (" cuda , combine = torch ", "combine", "torch"),
    ],
)
def test_request_grammar(text: str, operator: str, expected: str | None) -> None:
    assert registry.parse_request(text).backend_for(operator) == expected


def test_parts_obey_what_is_said_of_the_whole_unless_named() -> None:
    request = registry.parse_request("nsa_attention=cuda,combine=torch")
    assert request.backend_for("select_blocks", part=True) == "cuda"
    assert request.backend_for("select_blocks") is None
    assert request.backend_for("combine", part=True) == "torch"


@pytest.mark.parametrize(
    ("text", "listed"), [("cudaa", "cuda, rocm"), ("attention=torch", "select_blocks")]
)
def test_unknown_names_raise_and_list_the_known(text: str, listed: str) -> None:
    with pytest.raises(nsa_port.UnknownBackend, match=re.escape(listed)):
        nsa_port.use_backend(text).__enter__()


def test_naming_an_operator_twice_is_an_error() -> None:
    with pytest.raises(ValueError, match="twice"):
        registry.parse_request("combine=torch,combine=cuda")


class Plugin(TorchBackend):
    """Runs `combine` alone, and only where it is forced."""

    name = "plugin"
    kernels: Mapping[str, str] = {"combine": "nsa_port_test_kernels"}

    def is_native(self, environment: Environment) -> bool:
        return False


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Plugs `Plugin` in and notes there when it ran."""
    ran: list[str] = []

    def combine(a: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
        ran.append("plugin")
        return a.clone()

    module = ModuleType("nsa_port_test_kernels")
    module.__dict__["combine"] = combine
    monkeypatch.setitem(sys.modules, module.__name__, module)
    with registry.plug_in(Plugin()):
        yield ran


def combine(backend: str | None = None) -> None:
    o = torch.randn(1, 3, 2, 4)
    nsa_port.combine(o, o, o, torch.rand(3), backend=backend)


def test_argument_beats_context_beats_variable(
    call: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    combine()
    assert call == []
    monkeypatch.setenv("NSA_PORT_BACKEND", "plugin")
    combine()
    assert call == ["plugin"]
    with nsa_port.use_backend("torch"):
        combine()
        assert call == ["plugin"]
        combine(backend="plugin")
        assert call == ["plugin", "plugin"]


def test_a_narrower_request_leaves_other_operators_to_the_next_source(
    call: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NSA_PORT_BACKEND", "plugin")
    with nsa_port.use_backend("select_blocks=torch"):
        combine()
    assert call == ["plugin"]


def test_compiled_code_obeys_the_variable_and_the_context(
    call: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled = torch.compile(
        lambda o, g: nsa_port.combine(o, o, o, g), fullgraph=True, backend="eager"
    )
    o, g = torch.randn(1, 3, 2, 4), torch.rand(3)
    compiled(o, g)
    monkeypatch.setenv("NSA_PORT_BACKEND", "plugin")
    compiled(o, g)
    monkeypatch.delenv("NSA_PORT_BACKEND")
    with nsa_port.use_backend("plugin"):
        compiled(o, g)
    compiled(o, g)
    assert call == ["plugin", "plugin"]


class Picky(TorchBackend):
    """Native everywhere, and refuses everything."""

    name = "picky"

    def call_reasons(self, environment: Environment, problem: Problem) -> tuple[Reason, ...]:
        return (Reason("too_picky", "never", value="1", bound="2", remedy="3"),)


def test_automatic_fallback_warns_once_per_cause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_told", set())
    with registry.plug_in(Picky()):
        with pytest.warns(nsa_port.NSAPortWarning, match="too_picky"):
            combine()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            combine()


def test_fallback_can_be_forbidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NSA_PORT_FALLBACK", "error")
    with (
        registry.plug_in(Picky()),
        pytest.raises(nsa_port.BackendUnavailable, match="too_picky"),
    ):
        combine()


def test_unknown_variables_warn_with_the_nearest_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NSA_PORT_BAKCEND", "torch")
    monkeypatch.setattr(settings, "_scanned", -1)  # one test's variable replaced another's
    with pytest.warns(nsa_port.NSAPortWarning, match="did you mean NSA_PORT_BACKEND"):
        settings.requested_backend()


@pytest.mark.parametrize(("text", "expected"), [("1", True), ("false", False), ("", False)])
def test_switches_mean_what_they_say(
    text: str, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NSA_PORT_CHECK", text)
    assert settings.check_device_data() is expected


def test_a_switch_with_another_value_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NSA_PORT_CHECK", "maybe")
    with pytest.raises(ValueError, match="NSA_PORT_CHECK"):
        settings.check_device_data()


def test_a_broken_plugin_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    point = importlib.metadata.EntryPoint(
        "sick", "nsa_port_no_such_module:BACKEND", registry.ENTRY_POINTS
    )
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda **_: [point])
    registry.table.cache_clear()
    try:
        sick = {status.name: status for status in nsa_port.backends()}["sick"]
    finally:
        registry.table.cache_clear()
    assert not sick.available
    assert [reason.code for reason in sick.reasons] == ["plugin_broken"]
    assert "nsa_port_no_such_module" in str(sick)


def test_missing_operator_is_a_reason_with_the_way_around() -> None:
    backend = CudaBackend()
    backend.kernels = {"combine": "some.module"}
    choice = registry.select((backend, TorchBackend()), H200, PROBLEM, "cuda")
    (reason,) = choice.reasons_against("cuda")
    assert reason.code == "operator_not_implemented"
    assert "selected_attention=torch" in reason.remedy


def test_explain_lists_every_operator_and_every_backend() -> None:
    cfg = nsa_port.NSAConfig()
    q, k = torch.randn(1, 64, 4, 16), torch.randn(1, 64, 2, 16)
    k_cmp = nsa_port.reference.mean_compress(k, cfg)
    explained = nsa_port.explain(q, k_cmp, k_cmp, k, k, k, k, torch.rand(3), cfg)
    assert set(explained.backends.values()) == {"torch"}
    assert {name for name, _ in explained["combine"].rejected} == {"cuda", "rocm"}
    forced = nsa_port.explain(q, k_cmp, k_cmp, k, k, k, k, torch.rand(3), cfg, backend="cuda")
    assert set(forced.backends.values()) == {None}
    assert "no_device" in str(forced)


def test_triton_is_identified_by_its_folder_not_by_its_distribution() -> None:
    found = environment.find_triton()
    if found is None:
        pytest.skip("no triton here")
    assert "nvidia" in found.backends
    assert re.match(r"\d+\.\d+", found.version)
