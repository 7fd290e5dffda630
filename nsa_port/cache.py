"""The key/value cache of one `NativeSparseAttention` layer, for inference."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from nsa_port.kernels.geometry import NSAConfig

Lengths = int | Sequence[int] | Tensor
"""One number for all batch entries, or one for each."""

Compress = Callable[[Tensor], Tensor]
"""Tokens `[B, S, HK, D]` to compressed blocks `[B, num_compressed(S), HK, D]`."""


@dataclass(frozen=True, slots=True)
class Append:
    """Where the rows of one call go.

    Args:
        before: tokens of each batch entry before the call.
        after: tokens of each batch entry after it.
        start: where the rows go, if that is the same for all entries and none is padding.
        positions: int32 `[B, T]`, where they go otherwise; -1 for padding.
    """

    before: tuple[int, ...]
    after: tuple[int, ...]
    start: int | None
    positions: Tensor | None

    @property
    def num_keys(self) -> int:
        """`S` of the call: the tokens of the longest entry."""
        return max(self.after)


class NSACache:
    """Keys, values and compressed blocks of up to `max_length` tokens per batch entry.

    Everything is allocated at once and written in place. Entries may differ in length; the host
    knows all lengths, so that a step neither copies anything that grows with them nor synchronises
    with the device. Raw tokens are kept for compression too (at no cost where the branches share
    one key/value set), so that any number of tokens can be rolled back.

    Args:
        config: the block geometry.
        batch_size: entries, `B`.
        max_length: the most tokens of an entry.
        num_kv_heads: `HK`.
        head_dim: `Dk`.
        v_head_dim: `Dv`, `head_dim` by default.
        shared_kv: the branches share one key/value set instead of having three.
    """

    def __init__(
        self,
        config: NSAConfig,
        batch_size: int,
        max_length: int,
        num_kv_heads: int,
        head_dim: int,
        v_head_dim: int | None = None,
        *,
        shared_kv: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        for name, size in (("batch_size", batch_size), ("max_length", max_length)):
            if size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}")
        self.config = config
        self.batch_size = batch_size
        self.max_length = max_length
        self._lengths = (0,) * batch_size
        sets = 1 if shared_kv else 3
        blocks = config.num_compressed(max_length)
        # Rows past an entry's length stay 0: attention masks them, but 0 * NaN is NaN. Each buffer
        # has one spare row at the end that nobody reads; what is padding gets written there.
        with torch.inference_mode(False):  # such tensors work outside of inference mode too
            self._k, self._v = (
                torch.zeros(
                    (sets, batch_size, max_length + 1, num_kv_heads, dim),
                    device=device,
                    dtype=dtype,
                )
                for dim in (head_dim, head_dim if v_head_dim is None else v_head_dim)
            )
            self._k_cmp, self._v_cmp = (
                raw.new_zeros((batch_size, blocks + 1, *raw.shape[3:]))
                for raw in (self._k, self._v)
            )

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each batch entry."""
        return self._lengths

    @property
    def device_lengths(self) -> Tensor:
        """`lengths` as a new int32 tensor on the cache's device."""
        return self._to_device(torch.tensor(self._lengths, dtype=torch.int32))

    @property
    def device(self) -> torch.device:
        return self._k.device

    @property
    def dtype(self) -> torch.dtype:
        return self._k.dtype

    def __repr__(self) -> str:
        return (
            f"NSACache(lengths={self._lengths}, max_length={self.max_length}, "
            f"dtype={self.dtype}, device={self.device})"
        )

    # ------------------------------------------------------------------ forgetting

    def rollback(self, num_tokens: Lengths) -> None:
        """Forget the last `num_tokens` tokens, e.g. those that speculation got wrong.

        Raises:
            ValueError: an entry has fewer tokens; nothing is forgotten then.
        """
        counts = self._per_entry("num_tokens", num_tokens)
        for entry, (count, length) in enumerate(zip(counts, self._lengths, strict=True)):
            if count > length:
                raise ValueError(f"cannot roll back {count} of {length} tokens of entry {entry}")
        self._shorten(tuple(n - m for n, m in zip(self._lengths, counts, strict=True)))

    def truncate(self, length: Lengths) -> None:
        """Keep at most the first `length` tokens of each entry."""
        most = self._per_entry("length", length)
        self._shorten(tuple(min(pair) for pair in zip(self._lengths, most, strict=True)))

    def reset(self) -> None:
        """Forget everything."""
        self._shorten((0,) * self.batch_size)

    def _shorten(self, lengths: tuple[int, ...]) -> None:
        before, self._lengths = self._lengths, lengths
        self._clear(before)

    def _clear(self, used: tuple[int, ...]) -> None:
        """Zero what was written in the rows from `lengths` up to `used`."""
        count = self.config.num_compressed
        self._clear_rows((self._k, self._v), self._lengths, max(used))
        blocks = tuple(count(n) for n in self._lengths)
        self._clear_rows((self._k_cmp, self._v_cmp), blocks, count(max(used)))

    def _clear_rows(self, buffers: Sequence[Tensor], keep: tuple[int, ...], stop: int) -> None:
        start = min(keep)
        if start >= stop:
            return
        past = torch.arange(start, stop) >= torch.tensor(keep)[:, None]
        past = self._to_device(past)[:, :, None, None]
        for buffer in buffers:
            buffer[..., start:stop, :, :].masked_fill_(past, 0)

    # ------------------------------------------------------------------ appending

    @contextmanager
    def append(self, num_rows: int, lengths: Lengths | None = None) -> Iterator[Append]:
        """Make room for `num_rows` more rows; they count once the block ends without an error.

        Args:
            num_rows: rows of the call, `T`.
            lengths: how many of them are tokens in each entry, the rest being padding.

        Raises:
            ValueError: an entry would exceed `max_length`, or `lengths` does not fit. Then, and
                if the block raises, the cache stays as it was.
        """
        counts = self._per_entry("lengths", num_rows if lengths is None else lengths)
        if max(counts) > num_rows:
            raise ValueError(f"lengths must not exceed the {num_rows} rows, got {max(counts)}")
        after = tuple(n + m for n, m in zip(self._lengths, counts, strict=True))
        for entry, length in enumerate(after):
            if length > self.max_length:
                raise ValueError(
                    f"the cache is full: entry {entry} has {self._lengths[entry]} of at most "
                    f"{self.max_length} tokens, {counts[entry]} more do not fit"
                )
        start, positions = None, None
        if _all_are(num_rows, counts) and _all_are(self._lengths[0], self._lengths):
            start = self._lengths[0]
        else:
            row = torch.arange(num_rows, dtype=torch.int32)
            where = torch.tensor(self._lengths, dtype=torch.int32)[:, None] + row
            where = torch.where(row < torch.tensor(counts)[:, None], where, -1)
            positions = self._to_device(where)
        try:
            yield Append(self._lengths, after, start, positions)
        except BaseException:
            self._clear(after)
            raise
        self._lengths = after

    def write(
        self, step: Append, k: Tensor, v: Tensor, compress_k: Compress, compress_v: Compress
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Store the rows of `step` and compress the blocks that they complete.

        Args:
            k: `[sets, B, T, HK, Dk]`, one set or three: compressed, selected, window.
            v: `[sets, B, T, HK, Dv]`.

        Returns:
            What attention reads: `k_cmp, v_cmp, k_slc, v_slc, k_win, v_win`, views of the cache.

        Raises:
            ValueError: shapes or devices do not fit the cache.
            TypeError: the dtype does not.
        """
        for name, rows, buffer in (("k", k, self._k), ("v", v, self._v)):
            self._check(name, rows, buffer)
        for raw, rows in ((self._k, k), (self._v, v)):
            self._store(step, raw, rows)
        for raw, blocks, compress in (
            (self._k[0], self._k_cmp, compress_k),
            (self._v[0], self._v_cmp, compress_v),
        ):
            self._complete_blocks(step, raw, blocks, compress)
        S, C = step.num_keys, self.config.num_compressed(step.num_keys)
        _, k_slc, k_win = self._k[:, :, :S].expand(3, -1, -1, -1, -1)
        _, v_slc, v_win = self._v[:, :, :S].expand(3, -1, -1, -1, -1)
        return self._k_cmp[:, :C], self._v_cmp[:, :C], k_slc, v_slc, k_win, v_win

    def _check(self, name: str, rows: Tensor, buffer: Tensor) -> None:
        expected = (*buffer.shape[:2], rows.shape[2], *buffer.shape[3:])
        if tuple(rows.shape) != expected:
            raise ValueError(
                f"{name} must be [sets, B, T, HK, D] = {list(expected)} for this cache, "
                f"got {list(rows.shape)}"
            )
        if rows.device != buffer.device:
            raise ValueError(f"the cache is on {buffer.device}, but {name} on {rows.device}")
        if rows.dtype != buffer.dtype:
            raise TypeError(f"the cache holds {buffer.dtype}, but {name} is {rows.dtype}")

    def _store(self, step: Append, raw: Tensor, rows: Tensor) -> None:
        if step.start is not None:
            raw[:, :, step.start : step.start + rows.shape[2]] = rows
            return
        assert step.positions is not None
        target = step.positions.where(step.positions >= 0, self.max_length)
        raw[:, self._entries(), target] = rows

    def _complete_blocks(
        self, step: Append, raw: Tensor, blocks: Tensor, compress: Compress
    ) -> None:
        """Compress the blocks whose last token is new, of each entry by itself."""
        size, stride = self.config.block_size, self.config.block_stride
        first = [self.config.num_compressed(n) for n in step.before]
        stop = [self.config.num_compressed(n) for n in step.after]
        most = max(b - a for a, b in zip(first, stop, strict=True))
        if most == 0:
            return
        if step.start is not None:
            tokens = raw[:, first[0] * stride : (stop[0] - 1) * stride + size]
            blocks[:, first[0] : stop[0]] = compress(tokens)
            return
        block = torch.tensor(first)[:, None] + torch.arange(most)
        token = (block * stride)[:, :, None] + torch.arange(size)
        target = block.where(block < torch.tensor(stop)[:, None], blocks.shape[1] - 1)
        tokens = raw[self._entries()[:, :, None], self._to_device(token.clamp(max=self.max_length))]
        compressed = compress(tokens.flatten(0, 1)).view(*block.shape, *blocks.shape[2:])
        blocks[self._entries(), self._to_device(target)] = compressed

    def _entries(self) -> Tensor:
        return torch.arange(self.batch_size, device=self.device)[:, None]

    def _to_device(self, host: Tensor) -> Tensor:
        """Copy without waiting for the device."""
        if self.device.type == "cuda":
            host = host.pin_memory()
        return host.to(self.device, non_blocking=True)

    def _per_entry(self, name: str, value: Lengths) -> tuple[int, ...]:
        """One non-negative number for each entry."""
        given = value.tolist() if isinstance(value, Tensor) else value
        numbers = (given,) * self.batch_size if isinstance(given, int) else tuple(given)
        if len(numbers) != self.batch_size:
            raise ValueError(
                f"{name} must be one number or one for each of the {self.batch_size} entries, "
                f"got {len(numbers)}"
            )
        if any(isinstance(n, bool) or not isinstance(n, int) for n in numbers):
            raise TypeError(f"{name} must be integers, got {value!r}")
        if min(numbers) < 0:
            raise ValueError(f"{name} must not be negative, got {list(numbers)}")
        return numbers


def _all_are(value: int, numbers: tuple[int, ...]) -> bool:
    """Whether all `numbers` are `value`; unlike a set of them, one graph serves other numbers."""
    return all(number == value for number in numbers)
