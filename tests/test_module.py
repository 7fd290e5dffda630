"""The attention layer: what it computes, and that PyTorch's machinery treats it as any layer."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

import nsa_port
from nsa_port import NativeSparseAttention, NSAConfig
from nsa_port.compression import LinearCompression, MLPCompression, compress
from nsa_port.rotary import rotary_angles, rotate

SMALL = NSAConfig(8, 4, 16, 3, 1, 1, 20)
HIDDEN, H, HK, DK, DV = 24, 4, 2, 8, 6
ALL_CHOSEN = 45
"""Tokens of so few blocks that rounding cannot change which ones are chosen."""


class LastTokens(nn.Module):
    """A user's own phi: a learned mix of the block's last two tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([0.3, 0.7]))

    def forward(self, blocks: Tensor) -> Tensor:
        return torch.einsum("bclhd,l->bchd", blocks[:, :, -2:], self.weight)


def make(compression: Any = "mlp", **options: Any) -> NativeSparseAttention:
    torch.manual_seed(0)
    given: dict[str, Any] = {"config": SMALL, "dtype": torch.float64, **options}
    if isinstance(compression, nn.Module):
        compression = copy.deepcopy(compression).to(given["dtype"])
    return NativeSparseAttention(HIDDEN, H, HK, DK, DV, compression=compression, **given)


def tokens(B: int = 2, T: int = 61, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(B, T, HIDDEN, dtype=dtype, generator=torch.Generator().manual_seed(1))


def cumulative(*lengths: int) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def assert_equal(actual: Tensor, expected: Tensor) -> None:
    """Equal but for the order of float64 (or the tensors' own) additions."""
    bound = 64 * torch.finfo(expected.dtype).eps * max(1.0, float(expected.detach().abs().max()))
    torch.testing.assert_close(actual, expected, rtol=0, atol=bound)


def assert_as_close_as(plain: Tensor, actual: Tensor, exact: Tensor) -> None:
    """As close to float64 as plain PyTorch in the same dtype comes, within a factor of two."""
    band = 2 * torch.finfo(actual.dtype).eps * float(exact.detach().abs().max())
    errors = [float((y.detach().double() - exact.detach()).abs().max()) for y in (actual, plain)]
    assert errors[0] <= 2 * errors[1] + band, errors


def gradients(layer: nn.Module) -> dict[str, Tensor]:
    found = {}
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None, f"no gradient reaches {name}"
        found[name] = parameter.grad.clone()
        parameter.grad = None
    return found


every_layer = pytest.mark.parametrize(
    "options",
    [
        {"compression": "mlp", "rotary_dim": 4},
        {"compression": "mlp", "shared_kv": True, "bias": True},
        {"compression": "linear"},
        {"compression": "mean", "rotary_dim": 8},
        {"compression": LastTokens(), "scale": 0.5},
    ],
    ids=["mlp-rope", "mlp-shared-bias", "linear", "mean-rope", "own-scale"],
)


# --------------------------------------------------------------------------- what it computes


def by_the_paper(layer: NativeSparseAttention, x: Tensor) -> Tensor:
    """Section 3.3 head by head and block by block, around the reference's attention."""
    B, T, _ = x.shape
    cfg, sets = layer.config, 1 if layer.shared_kv else 3
    q = layer.q_proj(x).view(B, T, H, DK)
    k = layer.k_proj(x).view(B, T, HK, sets, DK)
    v = layer.v_proj(x).view(B, T, HK, sets, DV)
    if layer.rotary_dim is not None:
        q, k = turn(q, layer.rotary_dim), turn(k, layer.rotary_dim)
    pairs = [(k[:, :, :, i % sets], v[:, :, :, i % sets]) for i in range(3)]
    raw_k, raw_v = pairs[0]
    starts = range(0, T - cfg.block_size + 1, cfg.block_stride)

    def by_phi(raw: Tensor, phi: nn.Module | None) -> Tensor:
        blocks = torch.stack([raw[:, i : i + cfg.block_size] for i in starts], dim=1)
        result: Tensor = blocks.mean(2) if phi is None else phi(blocks)
        return result

    gates = torch.sigmoid(layer.gate(x)).view(B, T, H, 3)
    out = nsa_port.reference.nsa_attention(
        q,
        by_phi(raw_k, layer.phi_k),
        by_phi(raw_v, layer.phi_v),
        *pairs[1],
        *pairs[2],
        gates,
        cfg,
        scale=layer.scale,
    )
    y: Tensor = layer.o_proj(out.reshape(B, T, H * DV))
    return y


def turn(x: Tensor, rotary_dim: int) -> Tensor:
    """RoPE by complex numbers, position by position."""
    half = rotary_dim // 2
    frequency = 10000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
    turned, exact = x.clone(), x.double()
    for position in range(x.shape[1]):
        z = torch.complex(exact[:, position, ..., :half], exact[:, position, ..., half:rotary_dim])
        z = z * torch.polar(torch.ones_like(frequency), position * frequency)
        turned[:, position, ..., :half] = z.real
        turned[:, position, ..., half:rotary_dim] = z.imag
    return turned


@every_layer
def test_layer_computes_what_the_paper_says(options: dict[str, Any]) -> None:
    layer, x = make(**options), tokens()
    assert_equal(layer(x), by_the_paper(layer, x))


@every_layer
def test_gradients_reach_every_parameter_and_match_the_paper(options: dict[str, Any]) -> None:
    layer, x = make(**options), tokens().requires_grad_()
    weight = tokens()
    (layer(x) * weight).sum().backward()
    found, dx = gradients(layer), x.grad
    x.grad = None
    (by_the_paper(layer, x) * weight).sum().backward()
    for name, expected in gradients(layer).items():
        assert expected.abs().max() > 0, name
        assert_equal(found[name], expected)
    assert dx is not None
    assert x.grad is not None
    assert_equal(dx, x.grad)


@every_layer
def test_packed_sequences_are_separate_sequences(options: dict[str, Any]) -> None:
    layer = make(**options)
    lengths = (0, 3, 40, 8, 0, 29, 1)
    x, cu = tokens(1, sum(lengths)), cumulative(*lengths)
    alone = [layer(part) for part in x.split(lengths, dim=1) if part.shape[1]]
    assert_equal(layer(x, cu_seqlens=cu), torch.cat(alone, dim=1))


@every_layer
def test_packed_gradients_are_the_sum_of_the_sequences(options: dict[str, Any]) -> None:
    layer, lengths = make(**options), (19, 5, 37)
    x, weight = tokens(1, sum(lengths)), tokens(1, sum(lengths))
    (layer(x, cu_seqlens=cumulative(*lengths)) * weight).sum().backward()
    found = gradients(layer)
    for part, own in zip(x.split(lengths, dim=1), weight.split(lengths, dim=1), strict=True):
        (layer(part) * own).sum().backward()
    for name, expected in gradients(layer).items():
        assert_equal(found[name], expected)


@pytest.mark.parametrize("T", [1, 7])
def test_sequence_without_a_block_still_gives_every_parameter_a_gradient(T: int) -> None:
    layer = make()
    layer(tokens(2, T)).sum().backward()
    assert float(gradients(layer)["phi_k.position"].abs().max()) == 0
    layer(tokens(1, 2 * T), cu_seqlens=cumulative(T, T)).sum().backward()
    gradients(layer)


def test_empty_batch_and_empty_sequence_give_empty_outputs() -> None:
    layer = make()
    assert layer(tokens(2, 0)).shape == (2, 0, HIDDEN)
    assert layer(tokens(1, 0), cu_seqlens=cumulative(0, 0)).shape == (1, 0, HIDDEN)
    assert layer(tokens(1, 0), cu_seqlens=cumulative()).shape == (1, 0, HIDDEN)


def test_partial_rope_leaves_the_other_channels() -> None:
    x = torch.randn(2, 5, 3, 8)
    cos, sin = rotary_angles(torch.arange(5)[None], 4, 10000.0, x.dtype)
    turned = rotate(x, cos, sin)
    assert torch.equal(turned[..., 4:], x[..., 4:])
    assert torch.equal(turned[:, 0], x[:, 0])
    assert not torch.isclose(turned[:, 1:, :, :4], x[:, 1:, :, :4]).all()


def test_rope_only_depends_on_distance() -> None:
    q, k = torch.randn(2, 1, 9, 1, 8, dtype=torch.float64)

    def logits(shift: int) -> Tensor:
        cos, sin = rotary_angles(torch.arange(9)[None] + shift, 8, 10000.0, q.dtype)
        return torch.einsum("bthd,bshd->bts", rotate(q, cos, sin), rotate(k, cos, sin))

    assert_equal(logits(1000), logits(0))


def test_rope_keeps_its_precision_in_16_bit_layers() -> None:
    x = torch.ones(1, 1, 1, 8, dtype=torch.bfloat16)
    far = torch.tensor([[50_001]])
    turned = rotate(x, *rotary_angles(far, 8, 10000.0, x.dtype))
    exact = rotate(x.double(), *rotary_angles(far, 8, 10000.0, torch.float64))
    torch.testing.assert_close(turned.double(), exact, rtol=0, atol=0.01)


# --------------------------------------------------------------------------- phi


@pytest.mark.parametrize(
    "phi", [MLPCompression(8, 6), LinearCompression(8, 6)], ids=["mlp", "linear"]
)
def test_learned_phi_starts_near_mean_pooling(phi: nn.Module) -> None:
    blocks = torch.randn(2, 5, 8, 3, 6)
    mean = blocks.mean(2)
    assert float((phi(blocks).detach() - mean).std() / mean.std()) < 0.25


def test_phi_of_packed_sequences_has_zero_rows_past_the_last_block() -> None:
    phi, lengths = MLPCompression(8, 6), (30, 3, 13)
    k, cu = torch.randn(1, sum(lengths), 2, 6), cumulative(*lengths)
    blocks = sum(SMALL.num_compressed(length) for length in lengths)
    compressed = compress(k, phi, SMALL, cu_seqlens=cu)
    assert compressed.shape[1] == sum(lengths) // SMALL.block_stride > blocks
    assert compressed[:, :blocks].abs().amin() > 0
    assert compressed[:, blocks:].abs().max() == 0
    averaged = compress(k, None, SMALL, cu_seqlens=cu)
    assert averaged.shape == compressed.shape


@pytest.mark.parametrize("phi", [MLPCompression(8, 6), None], ids=["mlp", "mean"])
def test_phi_never_reads_data_on_the_host(phi: nn.Module | None) -> None:
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        k, cu = torch.randn(1, 40, 2, 6), mode.from_tensor(cumulative(30, 10))
        assert compress(k, phi, SMALL, cu_seqlens=cu).shape[1] == 10


def test_own_phi_is_used_for_keys_and_a_copy_of_it_for_values() -> None:
    phi = LastTokens()
    layer = NativeSparseAttention(HIDDEN, H, HK, DK, config=SMALL, compression=phi)
    assert layer.phi_k is phi
    assert layer.phi_v is not phi
    pair = LastTokens(), LastTokens()
    layer = NativeSparseAttention(HIDDEN, H, HK, DK, config=SMALL, compression=pair)
    assert (layer.phi_k, layer.phi_v) == pair


def test_phi_of_the_wrong_shape_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"phi must map blocks .* from Identity"):
        make(nn.Identity())(tokens())


# --------------------------------------------------------------------------- PyTorch's machinery


@every_layer
def test_state_dict_round_trip(options: dict[str, Any]) -> None:
    layer, x = make(**options), tokens()
    torch.manual_seed(5)
    other = copy.deepcopy(layer)
    for parameter in other.parameters():
        nn.init.normal_(parameter)
    assert not torch.equal(other(x), layer(x))
    other.load_state_dict(layer.state_dict(), strict=True)
    assert torch.equal(other(x), layer(x))


def test_deepcopy_shares_nothing() -> None:
    layer, x = make(), tokens()
    before, other = layer(x), copy.deepcopy(layer)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    assert torch.equal(layer(x), before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_layer_moves_to_another_dtype(dtype: torch.dtype) -> None:
    layer, x = make(rotary_dim=4).to(dtype), tokens(1, ALL_CHOSEN, dtype)
    exact = by_the_paper(copy.deepcopy(layer).double(), x.double())
    y, plain = layer(x), by_the_paper(layer, x)
    assert y.dtype == dtype
    assert_as_close_as(plain, y, exact)


def test_factory_arguments_reach_every_parameter() -> None:
    layer = make(device="meta", dtype=torch.bfloat16)
    assert {(p.device.type, p.dtype) for p in layer.parameters()} == {("meta", torch.bfloat16)}
    layer = layer.to_empty(device="cpu")
    for module in layer.modules():
        reset = getattr(module, "reset_parameters", None)
        if reset is not None:
            reset()
    assert layer(tokens(dtype=torch.bfloat16)).isfinite().all()


def test_compiled_in_one_graph_it_computes_the_same_for_all_lengths() -> None:
    layer = make("linear", rotary_dim=4, dtype=torch.float32)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    for T in (40, 51, 66):
        x = tokens(2, T, torch.float32).requires_grad_()
        torch._dynamo.mark_dynamic(x, 1)
        y = compiled(x)
        y.square().sum().backward()
        found, dx = gradients(layer), x.grad
        x.grad = None
        expected = layer(x)
        expected.square().sum().backward()
        assert_equal(y, expected)
        assert dx is not None
        assert x.grad is not None
        assert_equal(dx, x.grad)
        for name, gradient in gradients(layer).items():
            torch.testing.assert_close(found[name], gradient)
    assert counter.frame_count == 1


def test_compiled_in_one_graph_it_takes_packed_sequences() -> None:
    layer = make(rotary_dim=4, dtype=torch.float32)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    for lengths in ((10, 30), (0, 25, 3, 22), (51, 1, 9)):
        x, cu = tokens(1, sum(lengths), torch.float32), cumulative(*lengths)
        torch._dynamo.mark_dynamic(x, 1)
        torch._dynamo.mark_dynamic(cu, 0)
        y = compiled(x, cu_seqlens=cu)
        y.square().sum().backward()
        found = gradients(layer)
        expected = layer(x, cu_seqlens=cu)
        expected.square().sum().backward()
        assert_equal(y, expected)
        for name, gradient in gradients(layer).items():
            torch.testing.assert_close(found[name], gradient)
    assert counter.frame_count == 1


@every_layer
def test_autocast_computes_in_16_bit_and_keeps_32_bit_gradients(options: dict[str, Any]) -> None:
    layer = make(**options, dtype=torch.float32)
    x = tokens(1, ALL_CHOSEN, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, plain = layer(x), by_the_paper(layer, x)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert {gradient.dtype for gradient in gradients(layer).values()} == {torch.float32}
    assert_as_close_as(plain, y, by_the_paper(copy.deepcopy(layer).double(), x.double()))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing_changes_nothing(use_reentrant: bool) -> None:
    layer = make()
    x = tokens().requires_grad_()
    layer(x).square().sum().backward()
    found, dx = gradients(layer), x.grad
    x.grad = None
    y = checkpoint(layer, x, use_reentrant=use_reentrant)
    assert isinstance(y, Tensor)
    y.square().sum().backward()
    for name, gradient in gradients(layer).items():
        assert torch.equal(gradient, found[name]), name
    assert dx is not None
    assert x.grad is not None
    assert torch.equal(dx, x.grad)


def test_parameters_may_be_views_of_one_flat_buffer() -> None:
    layer, x = make(), tokens()
    expected = layer(x)
    expected.square().sum().backward()
    grads = gradients(layer)
    flat = nn.utils.parameters_to_vector(layer.parameters()).detach().requires_grad_()
    pieces = flat.split([parameter.numel() for parameter in layer.parameters()])
    views = {
        name: piece.view_as(parameter)
        for (name, parameter), piece in zip(layer.named_parameters(), pieces, strict=True)
    }
    y = torch.func.functional_call(layer, views, (x,))
    y.square().sum().backward()
    assert torch.equal(y, expected)
    assert flat.grad is not None
    assert torch.equal(flat.grad, torch.cat([grads[name].flatten() for name in views]))


def test_layers_with_different_geometry_live_side_by_side() -> None:
    configs = SMALL, NSAConfig(4, 4, 8, 6, 2, 2, 5)
    layers, x = [make(config=config) for config in configs], tokens()
    alone = [layer(x) for layer in layers]
    again = [layer(x) for layer in reversed(layers)]
    assert not torch.equal(*alone)
    assert [torch.equal(*pair) for pair in zip(alone, reversed(again), strict=True)] == [True] * 2


def test_layer_runs_on_the_backend_it_is_told() -> None:
    with pytest.raises(nsa_port.BackendUnavailable, match="cuda"):
        make(backend="cuda")(tokens())
    layer, x = make(backend="torch"), tokens()
    with nsa_port.use_backend("cuda"):
        assert_equal(layer(x), by_the_paper(layer, x))


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"num_heads": 3}, ValueError, "num_kv_heads must divide num_heads"),
        ({"head_dim": 0}, ValueError, "head_dim must be at least 1"),
        ({"rotary_dim": 3}, ValueError, "rotary_dim must be even"),
        ({"rotary_dim": 10}, ValueError, "rotary_dim must be even and in"),
        ({"compression": "max"}, ValueError, "compression must be a module"),
    ],
)
def test_bad_options_are_errors(change: dict[str, Any], error: type, text: str) -> None:
    options = {"hidden_size": 24, "num_heads": 4, "num_kv_heads": 2, "head_dim": 8} | change
    with pytest.raises(error, match=text):
        NativeSparseAttention(**options)


def test_bad_input_is_an_error() -> None:
    layer = make()
    with pytest.raises(ValueError, match=r"x must be \[B, T, 24\]"):
        layer(torch.zeros(2, 5, 25, dtype=torch.float64))
    with pytest.raises(ValueError, match="packed sequences must have batch 1"):
        layer(tokens(2, 10), cu_seqlens=cumulative(10))
    with pytest.raises(ValueError, match="lengths needs a cache"):
        layer(tokens(2, 10), lengths=[1, 2])
