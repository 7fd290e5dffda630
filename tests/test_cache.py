"""The cache: however tokens arrive, the layer computes what it computes for all of them at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode

from nsa_port import NativeSparseAttention, NSACache, NSAConfig

SMALL = NSAConfig(8, 4, 16, 3, 1, 1, 20)
HIDDEN, T = 16, 61


class Middle(nn.Module):
    """A user's own phi without parameters."""

    def forward(self, blocks: Tensor) -> Tensor:
        return blocks[:, :, 3] - blocks[:, :, -1]


def make(compression: Any = "mlp", **options: Any) -> NativeSparseAttention:
    torch.manual_seed(0)
    given: dict[str, Any] = {"config": SMALL, "dtype": torch.float64, **options}
    layer = NativeSparseAttention(HIDDEN, 4, 2, 4, 6, compression=compression, **given)
    return layer.requires_grad_(False)


def tokens(B: int = 2, length: int = T, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(B, length, HIDDEN, dtype=torch.float64, generator=generator)


def feed(
    layer: NativeSparseAttention, x: Tensor, chunks: Sequence[int], cache: NSACache | None = None
) -> Tensor:
    """The outputs of x fed in chunks."""
    cache = layer.new_cache(x.shape[0], T) if cache is None else cache
    return torch.cat([layer(part, cache=cache) for part in x.split(list(chunks), dim=1)], dim=1)


def buffers(cache: NSACache) -> list[Tensor]:
    """Every number the cache holds, but for the spare rows that nobody reads."""
    return [
        buffer.narrow(-3, 0, buffer.shape[-3] - 1).clone()
        for buffer in (cache._k, cache._v, cache._k_cmp, cache._v_cmp)
    ]


def assert_same_state(cache: NSACache, lengths: tuple[int, ...], before: list[Tensor]) -> None:
    assert cache.lengths == lengths
    assert cache.device_lengths.tolist() == list(lengths)
    assert all(torch.equal(a, b) for a, b in zip(buffers(cache), before, strict=True))


def assert_equal(actual: Tensor, expected: Tensor) -> None:
    """Equal but for the order of float64 additions."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-13)


every_layer = pytest.mark.parametrize(
    "options",
    [
        {"compression": phi, "rotary_dim": rotary_dim, "shared_kv": shared_kv}
        for phi in ("mlp", "linear", "mean", Middle())
        for rotary_dim in (None, 2)
        for shared_kv in (False, True)
    ],
    ids=lambda options: "-".join(str(value) for value in options.values()),
)


# --------------------------------------------------------------------------- ways to arrive


@every_layer
def test_prefill_chunks_and_single_tokens_agree_with_no_cache(options: dict[str, Any]) -> None:
    layer, x = make(**options), tokens()
    expected = layer(x)
    for chunks in ([T], [3, 30, 1, 2, 25], [1] * T):
        assert_equal(feed(layer, x, chunks), expected)


@every_layer
def test_ragged_batch_is_each_entry_alone(options: dict[str, Any]) -> None:
    layer = make(**options)
    counts = [(5, 40, 0), (1, 1, 1), (9, 0, 7), (1, 1, 1), (3, 12, 20), (1, 0, 1), (1, 1, 1)]
    longest = [sum(column) for column in zip(*counts, strict=True)]
    x, cache = tokens(3), layer.new_cache(3, T)
    seen: list[list[Tensor]] = [[], [], []]
    done = [0, 0, 0]
    for step in counts:
        rows = torch.full((3, max(step), HIDDEN), torch.nan, dtype=x.dtype)
        for entry, count in enumerate(step):
            rows[entry, :count] = x[entry, done[entry] : done[entry] + count]
        y = layer(rows, cache=cache, lengths=step)
        for entry, count in enumerate(step):
            seen[entry].append(y[entry, :count])
            assert not y[entry, count:].any()
            done[entry] += count
        assert cache.lengths == tuple(done)
    for entry, length in enumerate(longest):
        assert_equal(torch.cat(seen[entry]), layer(x[entry : entry + 1, :length])[0])


def test_lengths_may_be_a_tensor_or_one_number() -> None:
    layer, x = make(), tokens()
    caches = [layer.new_cache(2, T) for _ in range(3)]
    given: list[Any] = [[9, 9], torch.tensor([9, 9], dtype=torch.int32), 9]
    a, b, c = (layer(x[:, :12], cache=k, lengths=n) for k, n in zip(caches, given, strict=True))
    assert torch.equal(a, b)
    assert torch.equal(a, c)
    assert_equal(a[:, :9], layer(x[:, :9]))


def test_cache_of_a_sequence_shorter_than_a_block_has_no_block() -> None:
    layer, x = make(), tokens(1, 7)
    assert_equal(feed(layer, x, [4, 3]), layer(x))


def test_bias_does_not_reach_padded_rows() -> None:
    layer = make(bias=True)
    y = layer(tokens(), cache=layer.new_cache(2, T), lengths=[T, 3])
    assert not y[1, 3:].any()
    assert y[1, :3].all()


# --------------------------------------------------------------------------- roll-back


@pytest.mark.parametrize("compression", ["mlp", "mean"])
@pytest.mark.parametrize("rejected", [1, 4, 11])
def test_rolled_back_speculation_never_happened(compression: str, rejected: int) -> None:
    layer, x, drafts = make(compression, rotary_dim=2), tokens(), tokens(seed=2)
    cache, other = layer.new_cache(2, T), layer.new_cache(2, T)
    feed(layer, x[:, :30], [30], cache)
    feed(layer, x[:, :30], [30], other)
    guess = torch.cat((x[:, 30:33], drafts[:, :rejected]), dim=1)
    verified = layer(guess, cache=cache)
    cache.rollback(rejected)
    assert_equal(verified[:, :3], layer(x[:, 30:33], cache=other))
    for a, b in zip(buffers(cache), buffers(other), strict=True):
        assert_equal(a, b)
    assert cache.lengths == other.lengths == (33, 33)
    rest = T - 33
    assert_equal(feed(layer, x[:, 33:], [1] * rest, cache), layer(x)[:, 33:])


def test_entries_roll_back_by_different_amounts() -> None:
    layer, x = make(), tokens()
    cache = layer.new_cache(2, T)
    feed(layer, x[:, :40], [40], cache)
    cache.rollback([0, 13])
    assert cache.lengths == (40, 27)
    y = layer(torch.stack((x[0, 40:53], x[1, 27:40])), cache=cache, lengths=torch.tensor([9, 13]))
    assert_equal(y[0, :9], layer(x)[0, 40:49])
    assert_equal(y[1], layer(x)[1, 27:40])
    cache.truncate(45)
    assert cache.lengths == (45, 40)
    cache.truncate([45, 39])
    cache.rollback(torch.tensor([6, 0]))
    assert cache.lengths == (39, 39)
    assert_equal(layer(x[:, 39:], cache=cache), layer(x)[:, 39:])


def test_reset_cache_is_a_new_cache() -> None:
    layer, x = make(), tokens()
    cache = layer.new_cache(2, T)
    feed(layer, tokens(seed=3), [T], cache)
    cache.reset()
    assert_same_state(cache, (0, 0), buffers(layer.new_cache(2, T)))
    assert_equal(layer(x, cache=cache), layer(x))


@pytest.mark.parametrize("how", ["rollback", "reset"])
def test_forgotten_nan_harms_nobody(how: str) -> None:
    layer, x = make(), tokens()
    cache = layer.new_cache(2, T)
    feed(layer, x[:, :20], [20], cache)
    layer(torch.full((2, 15, HIDDEN), torch.nan, dtype=x.dtype), cache=cache)
    if how == "rollback":
        cache.rollback(15)
        start = 20
    else:
        cache.reset()
        start = 0
    y = layer(x[:, start : start + 12], cache=cache, lengths=[2, 12])
    expected = layer(x)[:, start : start + 12]
    assert_equal(y[0, :2], expected[0, :2])
    assert_equal(y[1], expected[1])


def test_rollback_of_more_than_there_is_is_an_error() -> None:
    layer = make()
    cache = layer.new_cache(2, T)
    layer(tokens()[:, :9], cache=cache, lengths=[9, 4])
    before = buffers(cache)
    with pytest.raises(ValueError, match="cannot roll back 5 of 4 tokens of entry 1"):
        cache.rollback(5)
    with pytest.raises(ValueError, match="num_tokens must not be negative"):
        cache.rollback(-1)
    with pytest.raises(ValueError, match="one for each of the 2 entries, got 3"):
        cache.truncate([1, 2, 3])
    with pytest.raises(TypeError, match="num_tokens must be integers"):
        cache.rollback([1.0, 2.0])  # type: ignore[list-item]
    assert_same_state(cache, (9, 4), before)


# --------------------------------------------------------------------------- errors


def test_overflow_is_an_error_and_not_a_write() -> None:
    layer, x = make(), tokens()
    cache = layer.new_cache(2, 20)
    feed(layer, x[:, :15], [15], cache)
    before = buffers(cache)
    with pytest.raises(ValueError, match="entry 0 has 15 of at most 20 tokens, 6 more do not fit"):
        layer(x[:, 15:21], cache=cache)
    assert_same_state(cache, (15, 15), before)
    cache.rollback([5, 0])
    before = buffers(cache)
    with pytest.raises(ValueError, match="entry 1 has 15"):
        layer(x[:, 15:25], cache=cache, lengths=[10, 6])
    assert_same_state(cache, (10, 15), before)
    layer(x[:, 15:25], cache=cache, lengths=[10, 5])
    assert cache.lengths == (20, 20)


def test_wrong_input_leaves_the_cache_as_it_was() -> None:
    layer, x = make(), tokens()
    cache = layer.new_cache(2, T)
    layer(x[:, :15], cache=cache, lengths=[15, 12])
    before, more = buffers(cache), x[:, :5]
    cu = torch.tensor([0, 5], dtype=torch.int32)
    with pytest.raises(ValueError, match="the cache has batch size 2, x has 1"):
        layer(more[:1], cache=cache)
    with pytest.raises(ValueError, match="the cache is on cpu, x on meta"):
        layer(more.to("meta"), cache=cache)
    with pytest.raises(TypeError, match=r"the cache holds torch.float64, but k is torch.float32"):
        layer.float()(more.float(), cache=cache)
    layer.double()
    with pytest.raises(ValueError, match="drop cu_seqlens"):
        layer(more[:1], cache=cache, cu_seqlens=cu)
    with pytest.raises(ValueError, match="lengths must not exceed the 5 rows, got 6"):
        layer(more, cache=cache, lengths=[5, 6])
    with pytest.raises(ValueError, match="must not be negative"):
        layer(more, cache=cache, lengths=[5, -1])
    with pytest.raises(ValueError, match="the cache is made for"):
        make(config=NSAConfig(4, 4, 16, 3, 1, 1, 20))(more, cache=cache)
    with pytest.raises(ValueError, match=r"k must be \[sets, B, T, HK, D\]"):
        make(shared_kv=True)(more, cache=cache)
    assert_same_state(cache, (15, 12), before)


@pytest.mark.parametrize("lengths", [None, [10, 4]])
def test_error_in_the_middle_of_a_step_leaves_the_cache_as_it_was(
    lengths: list[int] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer, x = make(), tokens()
    cache = layer.new_cache(2, T)
    layer(x[:, :15], cache=cache)
    before = buffers(cache)

    def fail(_: Tensor) -> Tensor:
        raise RuntimeError("no luck")

    assert layer.phi_v is not None
    monkeypatch.setattr(layer.phi_v, "forward", fail)
    with pytest.raises(RuntimeError, match="no luck"):
        layer(x[:, 15:25], cache=cache, lengths=lengths)
    assert_same_state(cache, (15, 15), before)


def test_no_gradient_flows_through_a_cache() -> None:
    layer, x = make().requires_grad_(True), tokens()
    cache = layer.new_cache(2, T)
    assert not layer(x, cache=cache).requires_grad
    cache.reset()
    with pytest.raises(RuntimeError, match="no gradient flows through a cache"):
        layer(x.requires_grad_(), cache=cache)
    assert cache.lengths == (0, 0)
    with torch.no_grad():
        layer(x, cache=cache)


@pytest.mark.parametrize(("batch_size", "max_length"), [(0, 5), (1, 0)])
def test_cache_without_room_is_an_error(batch_size: int, max_length: int) -> None:
    with pytest.raises(ValueError, match="must be at least 1"):
        make().new_cache(batch_size, max_length)


# --------------------------------------------------------------------------- PyTorch's machinery


def test_cache_has_the_dtype_the_layer_computes_in() -> None:
    layer, x = make(dtype=torch.float32), tokens().float()
    assert layer.new_cache(1, 8).dtype == torch.float32
    assert layer.new_cache(1, 8, dtype=torch.float16).dtype == torch.float16
    assert layer.new_cache(1, 8, device="meta").device.type == "meta"
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cache = layer.new_cache(2, T)
        expected = layer(x)
        y = torch.cat([layer(part, cache=cache) for part in x.split([40, 21], dim=1)], dim=1)
    assert cache.dtype == y.dtype == torch.bfloat16
    atol = 32 * torch.finfo(torch.bfloat16).eps
    torch.testing.assert_close(y, expected, rtol=0, atol=atol)


def test_cache_made_in_inference_mode_works_outside_of_it() -> None:
    layer, x = make(), tokens()
    with torch.inference_mode():
        cache = layer.new_cache(2, T)
        inside = layer(x[:, :40], cache=cache)
    with torch.no_grad():
        outside = layer(x[:, 40:], cache=cache)
    cache.rollback(3)
    assert_equal(torch.cat((inside, outside), dim=1), layer(x))


def test_attention_reads_the_cache_in_place() -> None:
    layer, x = make(), tokens()
    cache = layer.new_cache(2, T)
    layer(x[:, :40], cache=cache)
    _, k, v = layer._project(x[:, 40:41], None)
    with cache.append(1) as step:
        views = cache.write(step, k, v, lambda t: t[:, :0], lambda t: t[:, :0])
    held = [
        buffer.untyped_storage().data_ptr()
        for buffer in vars(cache).values()
        if isinstance(buffer, Tensor)
    ]
    assert all(view.untyped_storage().data_ptr() in held for view in views)


@pytest.mark.parametrize("lengths", [None, [3, 1]])
def test_step_never_reads_data_on_the_host(lengths: list[int] | None) -> None:
    with FakeTensorMode():
        layer = make(rotary_dim=2)
        cache = layer.new_cache(2, T)
        for rows in (3, 3, 3, 3):
            layer(torch.randn(2, rows, HIDDEN, dtype=torch.float64), cache=cache, lengths=lengths)
        cache.rollback(1)


@pytest.mark.parametrize("lengths", [[20, 20], [20, 17]], ids=["even", "ragged"])
def test_compiled_decoding_needs_two_graphs(lengths: list[int]) -> None:
    """One for steps that complete a block and one for those that do not, whatever the length."""
    layer, x = make("mean", rotary_dim=2), tokens()
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    cache, other = layer.new_cache(2, T), layer.new_cache(2, T)
    for one in (cache, other):
        layer(x[:, :20], cache=one, lengths=lengths)
    for p in range(20, 50):
        part = x[:, p : p + 1]
        assert_equal(compiled(part, cache=cache), layer(part, cache=other))
        if p == 28:
            graphs = counter.frame_count
    assert cache.lengths == other.lengths
    assert counter.frame_count == graphs <= 4  # the first length is a constant of its own graph
