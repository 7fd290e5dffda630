"""Level 0: the package imports, the registry knows the backend, its refusals are reasons."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
from dataclasses import replace

import torch

import nsa_port
from nsa_port import environment as machine
from nsa_port import registry
from nsa_port.backends.interface import (
    OPERATORS,
    PARTS,
    Environment,
    Problem,
    Reason,
    TritonInfo,
)
from nsa_port.conformance import LEVELS, hold
from nsa_port.conformance.case import Case, Context
from nsa_port.conformance.inputs import Shape, make

_HIDE_DEVICES = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES")
_IMPORTS = """
import sys
import nsa_port
print(sorted({"triton", "onnx"} & set(sys.modules)), end=" ")
import torch
print(torch.cuda.is_initialized(), end=" ")
q = torch.ones(1, 3, 1, 4)
print(nsa_port.window_attention(q, q, q, nsa_port.NSAConfig(), backend="torch")[0].sum().item())
"""


def _import_without_accelerator(context: Context) -> None:
    environment = {**os.environ, **dict.fromkeys(_HIDE_DEVICES, "")}
    environment.pop("NSA_PORT_BACKEND", None)
    done = subprocess.run(
        [sys.executable, "-c", _IMPORTS], env=environment, capture_output=True, text=True
    )
    context.require(done.returncode == 0, f"importing fails: {done.stderr.strip()[-300:]}")
    context.require(
        done.stdout.split() == ["[]", "False", "12.0"],
        f"importing loads a compiler or touches a device: {done.stdout.strip()!r}",
    )


def _keeps_the_contract(context: Context) -> None:
    backend = context.backend
    context.require(bool(re.fullmatch(r"[a-z][a-z0-9_]*", backend.name)), "the name is no word")
    context.require(backend.level in LEVELS, f"level {backend.level} is none of 0 to 5")
    unknown = set(backend.kernels) - set(OPERATORS)
    context.require(not unknown, f"kernels for operators that do not exist: {sorted(unknown)}")
    missing = [
        operator for operator in ("mean_compress", *PARTS) if operator not in backend.kernels
    ]
    context.require(
        not missing or backend.level == 0,
        f"declares level {backend.level} and has no kernel for {', '.join(missing)}",
    )
    listed = [status.name for status in nsa_port.backends()]
    context.require(listed.count(backend.name) == 1, f"nsa_port.backends() lists {listed}")


def _kernels_exist(context: Context) -> None:
    backend = context.backend
    if registry.reasons(backend, machine.probe(context.device), _problem(), forced=True):
        return  # a backend that refuses this machine need not be importable on it
    for operator, target in backend.kernels.items():
        module = importlib.import_module(target)
        for suffix in ("",) if operator == "select_blocks" else ("", "_backward"):
            found = callable(getattr(module, operator + suffix, None))
            context.require(found, f"{target} lacks {operator}{suffix}")


def _problem(dtype: torch.dtype = torch.float32) -> Problem:
    return Problem(
        operator="nsa_attention",
        dtype=dtype,
        num_queries=64,
        num_keys=64,
        heads=4,
        kv_heads=2,
        key_dim=32,
        value_dim=32,
    )


def _strange_machines() -> list[Environment]:
    bare = Environment(device_type="cpu", torch_version=torch.__version__)
    return [
        bare,
        replace(bare, device_type="cuda", device_name="Unknown Accelerator X", arch="sm_999"),
        replace(bare, device_type="cuda", hip_version="6.4", arch="gfx000", device_name="AMD"),
        replace(bare, device_type="xpu", device_name="Unknown XPU"),
        replace(bare, triton=TritonInfo(version="2.0", backends=())),
        replace(bare, triton=TritonInfo("not a version", ("nvidia",), ("triton", "other"))),
    ]


def _refusals_are_reasons(context: Context) -> None:
    backend = context.backend
    for environment in [*_strange_machines(), machine.probe(context.device)]:
        for dtype in (torch.float32, torch.bfloat16, torch.int8):
            found = registry.reasons(backend, environment, _problem(dtype))
            context.require(isinstance(found, tuple), f"reasons are a {type(found).__name__}")
            for reason in found:
                _check_reason(context, reason)
            again = registry.reasons(backend, environment, _problem(dtype))
            context.require(found == again, "asking twice gives different answers")
    refused = registry.reasons(backend, machine.probe(context.device), _problem(torch.int8))
    context.require(bool(refused), "int8 attention is accepted")


def _check_reason(context: Context, reason: Reason) -> None:
    context.require(
        bool(re.fullmatch(r"[a-z][a-z0-9_]*", reason.code)), f"{reason.code!r} is no stable code"
    )
    for part in ("message", "value", "bound", "remedy"):
        context.require(bool(getattr(reason, part)), f"[{reason.code}] has no {part}")


def _forced_means_forced(context: Context) -> None:
    inputs = make(Shape(T=70), torch.float32, context.device)
    explained = nsa_port.explain(*inputs.tensors, inputs.cfg, backend=context.name)
    predicted = {reason for c in explained for reason in c.reasons_against(context.name)}
    for choice in explained:
        name = choice.backend.name if choice.backend else None
        context.require(
            name in (context.name, None), f"{choice.operator} would quietly run on {name}"
        )
    try:
        hold.function(context, inputs)
        raised: set[Reason] = set()
    except nsa_port.BackendUnavailable as error:
        raised = set(error.reasons)
        for reason in raised:
            context.require(str(reason) in str(error), f"the error's text lacks {reason.code}")
    said, done = ([reason.code for reason in found] for found in (predicted, raised))
    context.require(
        bool(predicted) == bool(raised) and raised <= predicted,
        f"explain() says {sorted(said)}, the call {sorted(done)}",
    )


def _unknown_names_raise(context: Context) -> None:
    inputs = make(Shape(T=20), torch.float32, context.device)
    try:
        nsa_port.nsa_attention(*inputs.tensors, inputs.cfg, backend="nobody_knows_this")
        context.failures.append("an unknown backend is accepted")
    except nsa_port.UnknownBackend as error:
        context.require(context.name in str(error), "the error does not list the known names")


CASES = (
    Case(
        "import-without-accelerator",
        0,
        "Imports and runs without an accelerator",
        "importing nsa_port must load no kernel compiler and touch no device",
        _import_without_accelerator,
        dtypes=(),
        peers="imports and runs without a GPU",
    ),
    Case(
        "backend-contract",
        0,
        "The backend keeps the registry's contract",
        "the registry could not list or choose this backend",
        _keeps_the_contract,
        dtypes=(),
    ),
    Case(
        "kernels-exist",
        0,
        "Every kernel it names exists, forward and backward",
        "a call would be accepted and then fail",
        _kernels_exist,
        dtypes=(),
    ),
    Case(
        "refusals-are-reasons",
        0,
        "Refusals are reasons with value, bound and remedy, on any machine",
        "users could not learn why a backend does not run, or dispatch itself would break",
        _refusals_are_reasons,
        dtypes=(),
    ),
    Case(
        "forced-means-forced",
        0,
        "Forced means forced",
        "a result could come from another backend than the one asked for",
        _forced_means_forced,
        dtypes=(),
    ),
    Case(
        "unknown-backend-raises",
        0,
        "A name nobody knows raises and lists the names",
        "a typing error would choose a backend",
        _unknown_names_raise,
        dtypes=(),
    ),
)
