"""Triton kernels that the emulator's tests run."""

# mypy: ignore-errors
# Triton's own language has no types to give.
# Triton reads annotations as they are: no postponed evaluation here.

import triton
import triton.language as tl


@triton.jit
def add(x, y, out, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < n
    tl.store(out + i, tl.load(x + i, mask=inside) + tl.load(y + i, mask=inside), mask=inside)


@triton.jit
def add_without_mask(x, y, out, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + i, tl.load(x + i) + tl.load(y + i))


@triton.jit
def softmax(x, out, columns, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    i = tl.arange(0, BLOCK)
    values = tl.load(x + row * columns + i, mask=i < columns, other=float("-inf"))
    weights = tl.exp(values - tl.max(values, 0))
    tl.store(out + row * columns + i, weights / tl.sum(weights, 0), mask=i < columns)


@triton.jit
def matmul(a, b, c, M, N, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    columns = tl.program_id(1) * BN + tl.arange(0, BN)
    accumulator = tl.zeros((BM, BN), tl.float32)
    for start in range(0, K, BK):
        k = start + tl.arange(0, BK)
        left = tl.load(
            a + rows[:, None] * K + k[None, :],
            mask=(rows[:, None] < M) & (k[None, :] < K),
            other=0.0,
        )
        right = tl.load(
            b + k[:, None] * N + columns[None, :],
            mask=(k[:, None] < K) & (columns[None, :] < N),
            other=0.0,
        )
        accumulator = tl.dot(left, right, accumulator, input_precision="ieee")
    inside = (rows[:, None] < M) & (columns[None, :] < N)
    tl.store(c + rows[:, None] * N + columns[None, :], accumulator, mask=inside)


@triton.jit
def attention(q, k, v, out, T, scale, D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    d = tl.arange(0, D)
    query = tl.load(q + rows[:, None] * D + d[None, :], mask=rows[:, None] < T, other=0.0)
    largest = tl.full((BM,), -1e30, tl.float32)
    total = tl.zeros((BM,), tl.float32)
    accumulator = tl.zeros((BM, D), tl.float32)
    for start in range(0, tl.minimum((tl.program_id(0) + 1) * BM, T), BN):
        n = start + tl.arange(0, BN)
        place = n[:, None] * D + d[None, :]
        keys = tl.load(k + place, mask=n[:, None] < T, other=0.0)
        values = tl.load(v + place, mask=n[:, None] < T, other=0.0)
        scores = tl.dot(query, tl.trans(keys)) * scale
        scores = tl.where(n[None, :] <= rows[:, None], scores, -1e30)
        new_largest = tl.maximum(largest, tl.max(scores, 1))
        weights = tl.exp2(scores - new_largest[:, None])
        correction = tl.exp2(largest - new_largest)
        total = total * correction + tl.sum(weights, 1)
        accumulator = accumulator * correction[:, None]
        accumulator = tl.dot(weights.to(values.dtype), values, accumulator)
        largest = new_largest
    result = (accumulator / total[:, None]).to(out.dtype.element_ty)
    tl.store(out + rows[:, None] * D + d[None, :], result, mask=rows[:, None] < T)


@triton.jit
def column_sums(x, out, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.atomic_add(out + i, tl.load(x + tl.program_id(0) * BLOCK + i))


@triton.jit
def racy_column_sums(x, out, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(out + i, tl.load(out + i) + tl.load(x + tl.program_id(0) * BLOCK + i))


@triton.jit
def tickets(counter, out):
    tl.store(out + tl.program_id(0), tl.atomic_add(counter, 1))
    tl.atomic_max(counter + 1, tl.program_id(0))
    tl.atomic_cas(counter + 2, 0, 7)


@triton.jit
def grid_sizes(out):
    place = tl.program_id(0) + tl.num_programs(0) * (
        tl.program_id(1) + tl.num_programs(1) * tl.program_id(2)
    )
    tl.store(out + place, tl.num_programs(0) + 10 * tl.num_programs(1) + 100 * tl.num_programs(2))


@triton.jit
def scans(x, out, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    values = tl.load(x + i, mask=i < n, other=-1e9)
    tl.store(out + i, tl.cumsum(values, 0))
    tl.store(out + BLOCK + i, tl.sort(values))
    tl.store(out + 2 * BLOCK, tl.argmax(values, 0).to(tl.float32))
    tl.store(out + 2 * BLOCK + 1 + i, ((i * 7919) // (n % 13 + 3) + i % (n % 7 + 2)).to(tl.float32))


@triton.jit
def cast(x, out, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(out + i, tl.load(x + i).to(out.dtype.element_ty))
