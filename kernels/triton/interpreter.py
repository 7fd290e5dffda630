"""Lets Triton's interpreter (`TRITON_INTERPRET=1`) run under NumPy 2.4 and later, alike everywhere.

Triton 3.6 keeps scalars as arrays of one element and turns them into loop bounds with `int(array)`,
which NumPy has stopped accepting for anything but 0-dimensional arrays. Its matrix products are
NumPy's, whose rounding depends on the processor: here they are rounded once.
"""

from __future__ import annotations

from typing import Any

import triton


def repair() -> None:
    """Repair the interpreter, see above. Does nothing when kernels are compiled."""
    if not triton.knobs.runtime.interpret:
        return
    import numpy as np
    from triton.runtime import interpreter

    patch_tensor = interpreter._patch_lang_tensor

    def patch_tensor_and_index(tensor: Any, scope: Any) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch_tensor_and_index

    def create_dot(
        self: Any, a: Any, b: Any, d: Any, input_precision: Any, max_num_imprecise_acc: Any
    ) -> Any:
        product = np.matmul(a.data, b.data, dtype=np.float64) + d.data
        return interpreter.TensorHandle(product.astype(d.data.dtype), d.dtype.scalar)

    interpreter.InterpreterBuilder.create_dot = create_dot
