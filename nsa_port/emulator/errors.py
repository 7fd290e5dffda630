"""What the emulator reports: mistakes of a kernel, and things that the emulator cannot do."""

from __future__ import annotations


class EmulatorError(RuntimeError):
    """Base of everything that the emulator raises while it runs a kernel."""


class OutOfBounds(EmulatorError):
    """A kernel touched an address that belongs to none of the buffers that it was given."""


class DataRace(EmulatorError):
    """Two workgroups of one launch exchanged data through plain loads and stores."""


class NoProgress(EmulatorError):
    """A launch ran past its limit of steps, or waits for something that cannot happen."""


class Trap(EmulatorError):
    """A kernel stopped itself: a device assertion failed, or it reached unreachable code."""


class UnknownInstruction(EmulatorError):
    """A kernel reached an instruction, or a form of one, that no table of the emulator holds."""
