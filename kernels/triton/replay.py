"""Calls that come again: the launches of a call, noted once and repeated with other addresses.

For short sequences the host takes longer to decide what to launch than the GPU to do it. What a
call launches, and with what sizes, follows from the shapes, strides, dtypes and alignment of its
tensors and from its other arguments; only the addresses are new each time. So a call that comes a
second time is recorded, and from then on repeated: its results and its temporary memory are
allocated, and its kernels launched. Kernels and results are the same, and so is what a CUDA graph
captures.

What is repeated must consist of launches of Triton's kernels and of allocations alone: whatever
else a recording meets leaves the call to be decided anew each time.
"""

from __future__ import annotations

import functools
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from operator import itemgetter
from typing import Any, NamedTuple, ParamSpec, TypeVar

import torch
import triton
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from nsa_port.kernels import tables
from nsa_port.kernels.geometry import Layout
from nsa_port.kernels.triton.host import on_device_of

P = ParamSpec("P")
R = TypeVar("R")

_IS_KNOWN = triton.__version__.startswith("3.6.") and torch.version.cuda is not None
"""Whether this is the Triton, for NVIDIA, whose way to launch a compiled kernel is taken here."""

_MOST_ELEMENTS = 2**27
"""Of the first tensor, say 16k tokens of 64 heads. Larger calls have so much to do that the host's
time does not matter; and a repeated call holds all of its temporary memory from start to end."""

_FEWEST_QUERIES = 16
_MOST_CALLS = 256
_ALIGNMENT = 256


def repeats(operator: Callable[P, R]) -> Callable[P, R]:
    """The operator, on the device of its first tensor, queries or what has their length.

    Calls that come again are repeated. Of their arguments, only what tensors hold and where they
    lie may differ between such calls: nothing that the operator launches may depend on it. Its
    results are a tensor or a tuple of tensors.
    """

    @functools.wraps(operator)
    def call(*args: P.args, **options: P.kwargs) -> R:
        first: Any = args[0]
        with on_device_of(first):
            if options or not _may_repeat(first) or not _may_come_again(first, args):
                return operator(*args, **options)
            return _repeated(operator, args)

    return call


def _repeated(operator: Callable[..., R], args: tuple[Any, ...]) -> R:
    # Results of another operator, as a backward is given them, are a tuple among the arguments.
    flat = [x for arg in args for x in (arg if isinstance(arg, tuple) else (arg,))]
    tensors = [x for x in flat if isinstance(x, Tensor)]
    addresses = [tensor.data_ptr() for tensor in tensors]
    pairs = zip(tensors, addresses, strict=True)
    key = (
        operator,
        tensors[0].device.index,
        tables.state(),
        *[Tensor if isinstance(x, Tensor) else x for x in flat],
        *[(x.dtype, x.shape, x.stride(), address & 15) for x, address in pairs],
        # Which of them are the same tensor.
        *[addresses.index(address) for address in addresses],
    )
    plan = _plans.get(key, _UNSEEN)
    if isinstance(plan, _Plan):
        _keep(key)
        results: R = plan.repeat(addresses)
        return results
    if plan is _UNSEEN:
        _remember(key, _SEEN)
    elif plan is _SEEN:
        recording = _Recording(tensors)
        with recording.taking_notes():
            outputs = operator(*args)
        _remember(key, recording.plan(outputs))
        return outputs
    return operator(*args)


def _may_repeat(tensor: Tensor) -> bool:
    """Whether launches are as they are known here, nobody wants to hear of each, and it pays."""
    hooks = triton.knobs.runtime.launch_enter_hook
    heard = bool(getattr(hooks, "calls", hooks))
    return _IS_KNOWN and tensor.is_cuda and not heard and tensor.numel() <= _MOST_ELEMENTS


def _may_come_again(first: Tensor, args: tuple[Any, ...]) -> bool:
    """Decoding has other lengths each time, and packed sequences need more than launches."""
    if first.shape[1] < _FEWEST_QUERIES:
        return False
    layouts = (x for x in args if isinstance(x, Layout))
    return all(not layout.packed and layout.positions is None for layout in layouts)


_UNSEEN, _SEEN = object(), object()
_plans: OrderedDict[Hashable, Any] = OrderedDict()
"""By call: `_SEEN` after the first, then its plan, None for what cannot be repeated."""

_lock = threading.Lock()


def _remember(key: Hashable, value: Any) -> None:
    with _lock:
        _plans[key] = value
        while len(_plans) > _MOST_CALLS:
            _plans.popitem(last=False)


def _keep(key: Hashable) -> None:
    """Calls that come often are not forgotten for ones that came once."""
    with _lock:
        if key in _plans:
            _plans.move_to_end(key)


class _Place(NamedTuple):
    """An address: so many bytes behind the start of one of the call's pieces of memory.

    Pieces are numbered: the given tensors, then the results, then the workspace.
    """

    piece: int
    offset: int


class _Unrepeatable(Exception):
    """The call did something that cannot be repeated."""


@dataclass(slots=True)
class _Description:
    """What a launch reads of a tensor descriptor, with an address in place of its tensor."""

    shape: Sequence[int]
    strides: Sequence[int]
    padding: str
    address: int = 0

    @property
    def base(self) -> _Description:
        return self

    def data_ptr(self) -> int:
        return self.address


class _Launch(NamedTuple):
    """One launch: everything but the addresses, and which arguments those are."""

    kernel: Any
    grid: tuple[int, int, int]
    arguments: list[Any]
    pointers: list[tuple[int, _Place]]
    descriptors: list[tuple[int, _Description, _Place]]

    def run(self, stream: int, starts: Sequence[int]) -> None:
        arguments = self.arguments.copy()
        for index, (piece, offset) in self.pointers:
            arguments[index] = starts[piece] + offset
        for index, like, (piece, offset) in self.descriptors:
            address = starts[piece] + offset
            arguments[index] = _Description(like.shape, like.strides, like.padding, address)
        kernel = self.kernel
        kernel.run(
            *self.grid, stream, kernel.function, kernel.packed_metadata, None, None, None,
            *arguments,
        )  # fmt: skip


class _Plan(NamedTuple):
    """A call: its launches in order, and the memory that they need."""

    launches: list[_Launch]
    outputs: list[tuple[Callable[..., Tensor], torch.Size, torch.dtype]]
    result: Callable[[list[Tensor]], Any]
    workspace: int
    cleared: int
    device: torch.device

    def repeat(self, addresses: list[int]) -> Any:
        device = self.device
        outputs = [make(shape, dtype=dtype, device=device) for make, shape, dtype in self.outputs]
        starts = addresses + [output.data_ptr() for output in outputs]
        if self.workspace:
            workspace = torch.empty(self.workspace, dtype=torch.uint8, device=device)
            if self.cleared:
                workspace[: self.cleared].zero_()
            starts.append(workspace.data_ptr())
        stream = driver.active.get_current_stream(device.index)
        for launch in self.launches:
            launch.run(stream, starts)
        return self.result(outputs)


@dataclass(slots=True)
class _Memory:
    """A piece of memory: which addresses it covers; `zero` if it was asked for as zeros."""

    start: int
    size: int
    zero: bool = False

    def holds(self, address: int) -> bool:
        return self.start <= address < self.start + max(self.size, 1)


class _Recording(TorchDispatchMode):
    """Notes what one call allocates and launches."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        super().__init__()
        self._given = [_Memory(x.data_ptr(), _extent(x)) for x in tensors]
        self._device = tensors[0].device
        self._allocated: list[_Memory] = []
        # Kept alive, so that no memory is given out twice.
        self._storages: list[torch.UntypedStorage] = []
        self._launches: list[tuple[Any, tuple[int, ...], list[Any]]] = []
        self._obstacle = ""

    @contextmanager
    def taking_notes(self) -> Iterator[None]:
        thread, original = threading.get_ident(), JITFunction.run

        def run(kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
            compiled = original(kernel, *args, grid=grid, warmup=warmup, **options)
            if not warmup and threading.get_ident() == thread:
                self._launches.append((compiled, grid, _in_order(kernel, args, options)))
            return compiled

        with _recording:
            JITFunction.run = run
            try:
                with self:
                    yield
            finally:
                JITFunction.run = original

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func._schema.name.removeprefix("aten::")
        if name in _ALLOCATIONS:
            storage = result.untyped_storage()
            self._storages.append(storage)
            zero = name in ("zeros", "new_zeros")
            self._allocated.append(_Memory(storage.data_ptr(), storage.nbytes(), zero))
        elif not func.is_view:
            self._obstacle = self._obstacle or name
        return result

    def plan(self, result: Any) -> _Plan | None:
        """How to repeat what was noted, None where that cannot be."""
        try:
            if isinstance(result, Tensor):
                return self._plan([result], itemgetter(0))
            return self._plan(result, getattr(type(result), "_make", tuple))
        except _Unrepeatable:
            return None

    def _plan(self, outputs: Sequence[Tensor], result: Callable[[list[Tensor]], Any]) -> _Plan:
        if self._obstacle:
            raise _Unrepeatable(self._obstacle)
        returned = [_Memory(x.data_ptr(), x.numel() * x.element_size()) for x in outputs]
        for output, memory in zip(outputs, returned, strict=True):
            whole = any(memory.start == a.start and memory.size == a.size for a in self._allocated)
            if memory.size and not (whole and output.is_contiguous()):
                raise _Unrepeatable("a result is a part of something")
        starts = {memory.start for memory in returned if memory.size}
        zeros = {memory.start for memory in self._allocated if memory.zero}
        made = [torch.zeros if memory.start in zeros else torch.empty for memory in returned]
        # What has to start as zeros lies at the front of the workspace.
        temporary = [memory for memory in self._allocated if memory.start not in starts]
        temporary.sort(key=lambda memory: not memory.zero)
        offsets, workspace, cleared = [], 0, 0
        for memory in temporary:
            offsets.append(workspace)
            workspace += -(-memory.size // _ALIGNMENT) * _ALIGNMENT
            cleared = workspace if memory.zero else cleared
        pieces = [(memory, _Place(i, 0)) for i, memory in enumerate(self._given + returned)]
        i_workspace = len(pieces)
        pieces += [
            (memory, _Place(i_workspace, offset))
            for memory, offset in zip(temporary, offsets, strict=True)
        ]
        return _Plan(
            [_launch(*noted, pieces) for noted in self._launches],
            [(make, x.shape, x.dtype) for make, x in zip(made, outputs, strict=True)],
            result,
            workspace,
            cleared,
            self._device,
        )


_recording = threading.Lock()
"""Held while launches are noted: one call at a time puts itself in the way of Triton's launcher."""

_ALLOCATIONS = ("empty", "empty_strided", "new_empty", "empty_like", "zeros", "new_zeros")


def _extent(tensor: Tensor) -> int:
    """Bytes from the tensor's first element to the end of its last."""
    if not tensor.numel():
        return 0
    pairs = zip(tensor.shape, tensor.stride(), strict=True)
    return (sum((size - 1) * stride for size, stride in pairs) + 1) * tensor.element_size()


def _in_order(kernel: JITFunction, args: tuple, options: dict[str, Any]) -> list[Any]:
    """All arguments of a launch in the order of the kernel's parameters."""
    rest = list(kernel.signature.parameters.values())[len(args) :]
    return [*args, *(options.get(parameter.name, parameter.default) for parameter in rest)]


def _launch(
    kernel: Any, grid: tuple[int, ...], arguments: list[Any], pieces: list[tuple[_Memory, _Place]]
) -> _Launch:
    pointers, descriptors = [], []
    arguments = list(arguments)
    for index, argument in enumerate(arguments):
        if isinstance(argument, Tensor):
            address = arguments[index] = argument.data_ptr()
            if address:
                pointers.append((index, _place_of(address, pieces)))
        elif hasattr(argument, "block_shape"):
            like = _Description(argument.shape, argument.strides, argument.padding)
            descriptors.append((index, like, _place_of(argument.base.data_ptr(), pieces)))
            arguments[index] = None
        elif isinstance(argument, tuple | list) or callable(grid):
            raise _Unrepeatable("arguments that are not simple")
    x, y, z = (*grid, 1, 1)[:3]
    return _Launch(kernel, (x, y, z), arguments, pointers, descriptors)


def _place_of(address: int, pieces: list[tuple[_Memory, _Place]]) -> _Place:
    """Where an address of this call lies in any call like it.

    Given tensors may overlap, as parts of one: then only where one starts is clear.
    """
    found = [piece for piece in pieces if piece[0].start == address and piece[0].size][:1]
    found = found or [piece for piece in pieces if piece[0].holds(address)]
    if len(found) != 1:
        raise _Unrepeatable("an address that belongs to no tensor, or to several")
    memory, (piece, offset) = found[0]
    return _Place(piece, offset + address - memory.start)
