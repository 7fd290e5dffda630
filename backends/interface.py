"""The contract between the registry and a backend: what is asked, what is answered, what is run.

A backend is any object with the attributes of `Backend`. Its answer to a call is a tuple of
`Reason`s: empty means accepted. Its work is done by a module that holds one function per operator;
`OPERATORS` and the list below name them. An operator the module lacks is not supported.

Tensors are `[B, T, H, D]`; `config` is an `NSAConfig`, `layout` a `Layout`, `scale` a float.
Inputs are already checked (see `nsa_port.checks`), have a contiguous last dimension and otherwise
any strides; outputs are new contiguous tensors in `q`'s dtype, `lse` in float32 (float64 for
float64 inputs). Rows that see no key give `out = 0` and `lse = -inf`.

mean_compress(x, config, layout, num_blocks) -> y
    y `[B, num_blocks, HK, D]`; rows past the last block are 0
mean_compress_backward(grad, config, layout) -> dx
    dx `[B, layout.num_keys, HK, D]`
compressed_attention(q, k, v, config, layout, scale) -> out, lse
    out `[B, T, H, Dv]`, lse `[B, T, H]`, here and below
select_blocks(q, k_cmp, lse, config, layout, scale) -> indices
    int32 `[B, T, HK, n]`
selected_attention(q, k, v, indices, config, layout, scale) -> out, lse
window_attention(q, k, v, config, layout, scale) -> out, lse
compressed_attention_backward(grad_out, grad_lse, q, k, v, out, lse, config, layout, scale)
    -> dq, dk, dv
selected_attention_backward(grad_out, grad_lse, q, k, v, indices, out, lse, config, layout, scale)
    -> dq, dk, dv
window_attention_backward(grad_out, grad_lse, q, k, v, out, lse, config, layout, scale)
    -> dq, dk, dv
combine(o_cmp, o_slc, o_win, gates) -> out
    gates `[B, T, H, 3]`
combine_backward(grad, o_cmp, o_slc, o_win, gates) -> d_cmp, d_slc, d_win, dgates

Optional, where one kernel for the whole pays (otherwise the parts run one after the other):

nsa_attention(q, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, gates, config, layout, scale,
    needs_grad) -> WholeForward
nsa_attention_backward(grad, q, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, gates, saved, config,
    layout, scale) -> dq, dk_cmp, dv_cmp, dk_slc, dv_slc, dk_win, dv_win, dgates

`grad_lse` is None where nobody asked for it. `gates` may be expanded (stride 0); `dgates` has the
shape `[B, T, H, 3]`. Key positions past a dense layout's last compressed block (`k_cmp` longer
than `num_compressed(num_keys)`) belong to no one. Where `positions` are given, any of them may
lie anywhere in `-1 .. num_keys - 1`. Indices that an unchecked device tensor holds out of range
must never lead to an access out of bounds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch

from nsa_port.kernels.geometry import NSAConfig
from nsa_port.kernels.results import WholeForward

__all__ = [
    "OPERATORS",
    "PARTS",
    "Backend",
    "Environment",
    "Problem",
    "Reason",
    "TritonInfo",
    "WholeForward",
]

PARTS = (
    "compressed_attention",
    "select_blocks",
    "selected_attention",
    "window_attention",
    "combine",
)
"""The operators that `nsa_attention` is made of, in the order they run."""

OPERATORS = ("nsa_attention", "mean_compress", *PARTS)


@dataclass(frozen=True, slots=True)
class Reason:
    """Why a backend does not take a call.

    Args:
        code: stable, for programs and reports, e.g. `dtype_unsupported`.
        message: one sentence for people, with the value and the bound in it.
        value: what the call or the machine has.
        bound: what the backend needs.
        remedy: what the user can do about it.
        soft: it keeps automatic choice away, and whoever forces the backend overrides it.
    """

    code: str
    message: str
    value: str = ""
    bound: str = ""
    remedy: str = ""
    soft: bool = False

    def __str__(self) -> str:
        details = [f"{name}: {text}" for name, text in self._details() if text]
        return f"[{self.code}] {self.message}" + (f" ({'; '.join(details)})" if details else "")

    def _details(self) -> tuple[tuple[str, str], ...]:
        return (("value", self.value), ("bound", self.bound), ("remedy", self.remedy))


@dataclass(frozen=True, slots=True)
class TritonInfo:
    """The module `triton` that an import would really give.

    Distribution names prove nothing: triton, triton-rocm and triton-ascend install the same
    folder over each other, so everything but `owners` is read from the folder.

    Args:
        version: `triton.__version__`.
        backends: the compiler backends in the folder, e.g. `("amd", "nvidia")`.
        owners: the installed distributions that claim the folder; more than one have overwritten
            each other.
    """

    version: str
    backends: tuple[str, ...]
    owners: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Environment:
    """What a backend may know of the machine and of the device that holds the call's tensors.

    Args:
        device_type: `tensor.device.type`.
        device_name: the driver's name for the device, `""` for the CPU.
        arch: an opaque architecture string: `sm_90`, `gfx942`; `""` where there is none.
        hip_version: `torch.version.hip`.
        cuda_version: `torch.version.cuda`.
        torch_version: `torch.__version__`.
        shared_memory: bytes of shared memory (LDS) a program may use, 0 if unknown.
        processors: multiprocessors or compute units, 0 if unknown.
        triton: the Triton found, None if there is none.
        interpreter: Triton's interpreter is on (`TRITON_INTERPRET=1`).
        emulate: the architecture of `NSA_PORT_EMULATE`, `""` if unset.
        numpy: NumPy is installed, which the emulator computes with.
    """

    device_type: str = "cpu"
    device_name: str = ""
    arch: str = ""
    hip_version: str | None = None
    cuda_version: str | None = None
    torch_version: str = ""
    shared_memory: int = 0
    processors: int = 0
    triton: TritonInfo | None = None
    interpreter: bool = False
    emulate: str = ""
    numpy: bool = True


@dataclass(frozen=True, slots=True)
class Problem:
    """One call of one operator, as far as a backend's choice may depend on it.

    Sizes that an operator does not have are 0. `shapes` is for messages.
    """

    operator: str
    dtype: torch.dtype
    batch: int = 1
    num_queries: int = 0
    num_keys: int = 0
    heads: int = 0
    kv_heads: int = 0
    key_dim: int = 0
    value_dim: int = 0
    packed: bool = False
    positions: bool = False
    needs_grad: bool = False
    config: NSAConfig = field(default_factory=NSAConfig)
    shapes: tuple[tuple[str, tuple[int, ...]], ...] = ()

    def __str__(self) -> str:
        shapes = ", ".join(f"{name} {list(shape)}" for name, shape in self.shapes)
        return f"{self.operator}({shapes}; {str(self.dtype).removeprefix('torch.')})"


class Backend(Protocol):
    """What the registry asks of a backend. Importing it loads no kernel and touches no device."""

    name: str
    """How users force it."""

    level: int
    """The conformance level it declares: up to there no case may be unsupported."""

    kernels: Mapping[str, str]
    """Operator -> dotted module that holds `operator` and `operator_backward`."""

    def is_native(self, environment: Environment) -> bool:
        """Whether this hardware is what the backend is made for.

        Automatic choice only looks at native backends, and warns when it has to pass one over.
        """
        ...

    def machine_reasons(self, environment: Environment) -> tuple[Reason, ...]:
        """Every reason why nothing at all runs here."""
        ...

    def call_reasons(self, environment: Environment, problem: Problem) -> tuple[Reason, ...]:
        """Every reason why this call does not run, given that others do."""
        ...
