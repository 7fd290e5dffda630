"""What every operator needs on the host: device, architecture, tuned values, head dimensions."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from nsa_port.kernels.tables import load_table as load_table
from nsa_port.kernels.tables import tuned as tuned

LOG2_E = math.log2(math.e)

HAS_HOPPER_GLUON = triton.__version__.startswith("3.6.")
"""Whether this is the Triton that the kernels for Hopper are written for: Gluon is not the same
from one to the next."""


class HeadSplit(NamedTuple):
    """A head dimension as the kernels cut it: `dim <= main + rest`, each a power of two or 0."""

    dim: int
    main: int
    rest: int


@cache
def split_head(dim: int, widest: int = 0) -> HeadSplit:
    """The cut that pads least: 192 is 128 + 64, 80 is 64 + 32, 100 is one tile of 128.

    Tiles that would be wider than `widest`, unless that is 0, are cut in halves instead.

    Matrix units want at least 16 columns. Only multiples of 16 are cut, and not into parts below
    32 columns: the rows of other dimensions are not aligned enough to be copied asynchronously.
    """
    whole = max(16, next_power_of_2(dim))
    main, rest = whole // 2, max(32, next_power_of_2(max(1, dim - whole // 2)))
    if widest and whole > widest:
        return HeadSplit(dim, main, main)
    if dim % 16 or dim == whole or rest >= main:
        return HeadSplit(dim, whole, 0)
    return HeadSplit(dim, main, rest)


def split_arguments(key: HeadSplit, value: HeadSplit) -> dict[str, int]:
    """Both head dimensions under the names that the kernels give them."""
    return {
        "DIM_K": key.dim,
        "K_MAIN": key.main,
        "K_REST": key.rest,
        "DIM_V": value.dim,
        "V_MAIN": value.main,
        "V_REST": value.rest,
    }


def cdiv(number: int, size: int) -> int:
    """`number / size`, rounded up. Triton's own is a function for kernels too, and slow here."""
    return -(-number // size)


def next_power_of_2(number: int) -> int:
    """The smallest power of two that is not below the number."""
    return 1 << max(number - 1, 0).bit_length()


def strides(tensor: Tensor) -> tuple[int, ...]:
    """All strides but the last, 0 for dimensions of size 1, whose stride means nothing.

    PyTorch leaves arbitrary numbers there, and each would compile a kernel of its own.
    """
    *sizes, _ = tensor.shape
    pairs = zip(sizes, tensor.stride(), strict=False)
    return tuple([0 if size == 1 else stride for size, stride in pairs])


def last_contiguous(tensor: Tensor) -> Tensor:
    """The tensor itself, or a copy where its last dimension is not contiguous."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def on_device_of(tensor: Tensor) -> AbstractContextManager:
    """Make the tensor's device the one that kernels are launched on."""
    if not tensor.is_cuda or tensor.device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(tensor.device)


def bits_of(count: int) -> int:
    """Steps that a binary search over `count` entries needs."""
    return max(count, 1).bit_length() + 1


def arch_of(tensor: Tensor) -> str:
    """The architecture that kernels for this tensor are built for: `sm_90`, `gfx942`.

    CPU tensors run wherever Triton's active driver says (an emulator, a compile-only driver), and
    in the interpreter, which has no architecture, on `""`.
    """
    if tensor.is_cuda:
        return _arch_of_device(tensor.device.index)
    if triton.knobs.runtime.interpret:
        return ""
    target = triton.runtime.driver.active.get_current_target()
    return f"sm_{target.arch}" if target.backend == "cuda" else str(target.arch)


@cache
def multiprocessors(device: torch.device) -> int:
    """How many multiprocessors or compute units there are, 132 where there is no GPU."""
    if device.type == "cpu":
        return 132
    return torch.cuda.get_device_properties(device).multi_processor_count


@cache
def _arch_of_device(index: int) -> str:
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip is not None:
        return str(properties.gcnArchName).split(":")[0]
    return f"sm_{properties.major}{properties.minor}"


def launch_options(values: dict[str, int]) -> dict[str, int]:
    """Of a kernel's tuned values, those that pass through the operator as they are."""
    return {name: values[name] for name in _OPTIONS if name in values}


_OPTIONS = (
    "num_warps", "num_stages", "matrix_instr_nonkdim", "kpack", "waves_per_eu", "DEPTH", "RELOAD",
)  # fmt: skip
