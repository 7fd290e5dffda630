"""How long a fresh process waits for its first forward and backward, and a second length after it.

Run it with an empty `TRITON_CACHE_DIR`. Fails if the second length compiles anything.
"""

from __future__ import annotations

import time

STARTED = time.perf_counter()

import torch  # noqa: E402
from triton import knobs  # noqa: E402

import nsa_port  # noqa: E402


def run(T: int) -> None:
    """One forward and backward in bfloat16: 64 query heads, 4 KV heads of 128."""
    config = nsa_port.NSAConfig()

    def random(heads: int, width: int = 128) -> torch.Tensor:
        shape = (1, T, heads, width)
        return torch.randn(shape, device="cuda", dtype=torch.bfloat16, requires_grad=True)

    q, gates = random(64), random(64, 3)
    k, v, k_slc, v_slc, k_win, v_win = (random(4) for _ in range(6))
    k_cmp, v_cmp = (nsa_port.mean_compress(x, config, backend="cuda") for x in (k, v))
    tensors = (q, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, gates)
    out = nsa_port.nsa_attention(*tensors, config, backend="cuda")
    torch.autograd.grad(out, (q, k, v, *tensors[3:]), torch.randn_like(out))
    torch.cuda.synchronize()


def main() -> None:
    compiled: list[str] = []
    knobs.runtime.jit_post_compile_hook = lambda **info: compiled.append(info["repr"])
    run(8192)
    print(f"first forward and backward, imports included: {time.perf_counter() - STARTED:.1f} s")
    print(f"{len(compiled)} kernels compiled")
    compiled.clear()
    started = time.perf_counter()
    run(12345)
    print(f"a second length: {time.perf_counter() - started:.2f} s")
    if compiled:
        raise SystemExit(f"the second length compiled {len(compiled)} kernels: {compiled}")


if __name__ == "__main__":
    main()
