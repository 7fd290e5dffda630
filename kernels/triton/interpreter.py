"""Lets Triton's interpreter (`TRITON_INTERPRET=1`) run under NumPy 2.4 and later.

Triton 3.6 keeps scalars as arrays of one element and turns them into loop bounds with `int(array)`,
which NumPy has stopped accepting for anything but 0-dimensional arrays.
"""

from __future__ import annotations

from typing import Any

import triton


def repair() -> None:
    """Make the interpreter read a scalar's one element. Does nothing when kernels are compiled."""
    if not triton.knobs.runtime.interpret:
        return
    from triton.runtime import interpreter

    patch_tensor = interpreter._patch_lang_tensor

    def patch_tensor_and_index(tensor: Any, scope: Any) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch_tensor_and_index
