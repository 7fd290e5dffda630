"""Global memory: the registered buffers, each in an address range of its own, and nothing else.

A buffer lies in the middle of nowhere: ranges are 16 GiB apart, so that a stray 32-bit offset, of
either sign, cannot reach the neighbour, and every access is checked to the byte.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy import complex128, int32, int64, uint8, uint16, uint32, uint64

from nsa_port.emulator.errors import EmulatorError, OutOfBounds
from nsa_port.emulator.number_formats import Array

FIRST_ADDRESS = 1 << 44
_RANGE_BITS = 34
_ALIGNMENT = 256

LOW_HALF = uint32(0xFFFF)
HIGH_HALF = uint32(0xFFFF0000)


@dataclass(frozen=True, slots=True)
class Buffer:
    """A registered buffer: `address` as kernels see it, `start` in the emulator's own storage."""

    name: str
    address: int
    size: int
    start: int


class GlobalMemory:
    """The memory that one launch may touch.

    Register every buffer with `add` before the launch; read back with `contents`. `content` is the
    one array that holds them all.
    """

    def __init__(self) -> None:
        self.buffers: list[Buffer] = []
        self.content = np.zeros(0, uint8)
        self._parts: list[Array] = []
        self._starts = np.zeros(0, int64)
        self._sizes = np.zeros(0, int64)
        self._written = np.zeros(0, bool)
        self._views: dict[type, Array] = {}

    def add(self, content: Array, name: str) -> int:
        """Register a copy of `content` (uint8) and return its address."""
        if len(content) >= 1 << (_RANGE_BITS - 1):
            raise EmulatorError(f"buffer {name!r} has {len(content)} bytes; at most 8 GiB fit")
        last = self.buffers[-1] if self.buffers else None
        start = -(-(last.start + last.size) // _ALIGNMENT) * _ALIGNMENT if last else 0
        address = FIRST_ADDRESS + (len(self.buffers) << _RANGE_BITS)
        self.buffers.append(Buffer(name, address, len(content), start))
        self._parts.append(content)
        return address

    def seal(self) -> None:
        """Lay the buffers out; called once, when all are known."""
        last = self.buffers[-1]
        self.content = np.zeros(-(-(last.start + last.size + 16) // 16) * 16, uint8)
        for buffer, part in zip(self.buffers, self._parts, strict=True):
            self.content[buffer.start : buffer.start + buffer.size] = part
        self._parts = []
        self._starts = np.array([buffer.start for buffer in self.buffers], int64)
        self._sizes = np.array([buffer.size for buffer in self.buffers], int64)
        self._written = np.zeros(len(self.buffers), bool)
        words = (uint8, uint16, uint32, uint64, complex128)
        self._views = {dtype: self.content.view(dtype) for dtype in words}

    def contents(self, address: int) -> Array:
        """What the buffer at that address holds now (uint8, a view)."""
        buffer = self.buffers[self._number(address)]
        return self.content[buffer.start : buffer.start + buffer.size]

    def was_written(self, address: int) -> bool:
        """Whether a launch stored anything into the buffer at that address."""
        return bool(self._written[self._number(address)])

    @staticmethod
    def _number(address: int) -> int:
        return (address - FIRST_ADDRESS) >> _RANGE_BITS

    def view(self, dtype: type) -> Array:
        """The whole content as items of another type (a view)."""
        found = self._views.get(dtype)
        return self.content.view(dtype) if found is None else found

    def locate(self, addresses: Array, size: int, enabled: Array | None, what: str) -> Array:
        """uint64 addresses -> int64 positions in `content`, checking each enabled access.

        Disabled lanes get position 0. Raises `OutOfBounds`.
        """
        relative = (addresses - uint64(FIRST_ADDRESS)).view(int64)
        number = relative >> int64(_RANGE_BITS)
        known = (number >= 0) & (number < len(self.buffers))
        if not known.all():
            number = np.where(known, number, 0)
        offset = relative & int64((1 << _RANGE_BITS) - 1)
        allowed = known & (offset + int64(size) <= self._sizes[number])
        wrong = ~allowed if enabled is None else enabled & ~allowed
        if wrong.any():
            raise OutOfBounds(self._describe(addresses, wrong, size, what))
        position = self._starts[number] + offset
        return position if enabled is None else np.where(enabled, position, 0)

    def mark_written(self, positions: Array) -> None:
        """Note which buffers these positions lie in."""
        self._written[np.searchsorted(self._starts, positions, side="right") - 1] = True

    def buffer_holding(self, position: int) -> Buffer:
        """The buffer that a position in `content` belongs to."""
        return self.buffers[int(np.searchsorted(self._starts, position, side="right")) - 1]

    def _describe(self, addresses: Array, wrong: Array, size: int, what: str) -> str:
        addresses = np.broadcast_to(addresses, wrong.shape)
        wave, lane = (int(index) for index in np.argwhere(wrong)[0])
        address = int(addresses[wave, lane])

        def distance(buffer: Buffer) -> int:
            ends = (buffer.address, buffer.address + buffer.size)
            return min(abs(address - end) for end in ends)

        near = min(self.buffers, key=distance)
        return (
            f"out of bounds: {what} of {size} bytes at {address:#x} by lane {lane} "
            f"({int(wrong.sum())} lanes in all); the nearest buffer is {near.name!r}, "
            f"{near.size} bytes at {near.address:#x}, so that the offset is "
            f"{address - near.address}"
        )


def gather(content: Array, positions: Array, words: int) -> list[Array]:
    """Read `words` consecutive words of 32 bits at byte positions, aligned or not.

    content: a flat uint8 array whose length is a multiple of 16. Returns `words` arrays of uint32.
    """
    wide = complex128 if words == 4 else uint64
    bytes_ = 4 * words
    if words in (2, 4) and not (positions & (bytes_ - 1)).any():
        taken = content.view(wide).take(positions >> (bytes_.bit_length() - 1))
        parts = np.ascontiguousarray(taken).view(uint32).reshape(*positions.shape, words)
        return [parts[..., word] for word in range(words)]
    if (positions & 3).any():
        parts = content[positions[..., None] + np.arange(bytes_)].view(uint32)
        return [parts[..., word] for word in range(words)]
    view, first = content.view(uint32), positions >> 2
    return [view.take(first + word) for word in range(words)]


def scatter(content: Array, positions: Array, values: list[Array]) -> None:
    """Write words of 32 bits at byte positions (1-D), aligned or not; later entries win."""
    if (positions & 3).any():
        for word, value in enumerate(values):
            write_narrow(content, positions + 4 * word, value, 4)
        return
    view, first = content.view(uint32), positions >> 2
    for word, value in enumerate(values):
        view[first + word] = value


@dataclass(frozen=True, slots=True)
class Access:
    """What one lane reads or writes: words of 32 bits, or (words 0) a narrower item."""

    words: int
    bytes: int
    signed: bool = False
    half: bool = False
    """Only one half of the register: d16 forms."""
    high: bool = False
    """The upper half of it."""


def access(width: int, **narrow: bool) -> Access:
    """The access of `width` bits."""
    return Access(width // 32, width // 8, **narrow)


def read_narrow(content: Array, positions: Array, form: Access) -> Array:
    """One or two bytes, extended to uint32."""
    value = content[positions].astype(uint32)
    if form.bytes == 2:
        value = value | (content[positions + 1].astype(uint32) << uint32(8))
    if form.signed:
        rest = 32 - 8 * form.bytes
        value = ((value << uint32(rest)).view(int32) >> int32(rest)).view(uint32)
    return value


def place_narrow(value: Array, old: Array, half: bool, high: bool) -> Array:
    """The register after a narrow load: all of it, or one half with the other kept."""
    if not half:
        return value
    if high:
        return (old & LOW_HALF) | (value << uint32(16))
    return (old & HIGH_HALF) | (value & LOW_HALF)


def write_narrow(content: Array, positions: Array, value: Array, bytes_: int) -> None:
    """Store the low bytes of uint32 values (both 1-D)."""
    for byte in range(bytes_):
        content[positions + byte] = (value >> uint32(8 * byte)).astype(uint8)
