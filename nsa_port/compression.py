"""phi: what turns the tokens of a compression block into one compressed key or value (Eq. 7).

A phi is any module that maps blocks `[B, C, l, HK, D]` to `[B, C, HK, D]`: `l` tokens of `HK` heads
become one. It sees every block by itself, so it may neither mix blocks nor depend on their number;
training, prefill and decode then agree. `None` stands for mean pooling, which the operator
`nsa_port.mean_compress` does without the blocks ever being laid out.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from nsa_port.functional import mean_compress
from nsa_port.kernels.geometry import Layout, NSAConfig


class MLPCompression(nn.Module):
    """The paper's phi: an MLP over the block's tokens, each with a learned position embedding.

    One MLP serves all key/value heads. It starts as mean pooling plus a little noise: every output
    channel has two hidden units that hold its mean and its negative, and
    `gelu(z) - gelu(-z) = z`. Compressed attention is then useful from the first step.

    Args:
        block_size: tokens in a block, `l`.
        head_dim: channels of a head, `D`.
        hidden_size: hidden units, at least `2 * head_dim`, which is the default.
    """

    def __init__(
        self,
        block_size: int,
        head_dim: int,
        hidden_size: int | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        hidden_size = 2 * head_dim if hidden_size is None else hidden_size
        if hidden_size < 2 * head_dim:
            raise ValueError(
                f"hidden_size must be at least 2 * head_dim = {2 * head_dim}, got {hidden_size}"
            )
        self.position = nn.Parameter(torch.empty(block_size, head_dim, device=device, dtype=dtype))
        self.up = nn.Linear(block_size * head_dim, hidden_size, device=device, dtype=dtype)
        self.down = nn.Linear(hidden_size, head_dim, device=device, dtype=dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start near mean pooling."""
        block_size, head_dim = self.position.shape
        nn.init.normal_(self.position, std=_NOISE)
        for linear in (self.up, self.down):
            nn.init.normal_(linear.weight, std=_NOISE / linear.in_features**0.5)
            nn.init.zeros_(linear.bias)
        with torch.no_grad():
            mean = _mean_weight(block_size, self.up.weight[:head_dim])
            self.up.weight[:head_dim] += mean
            self.up.weight[head_dim : 2 * head_dim] -= mean
            self.down.weight[:, :head_dim].diagonal().add_(1)
            self.down.weight[:, head_dim : 2 * head_dim].diagonal().sub_(1)

    def forward(self, blocks: Tensor) -> Tensor:
        """`[B, C, l, HK, D]` to `[B, C, HK, D]`."""
        tokens = (blocks.transpose(2, 3) + self.position).flatten(-2)
        return self.down(functional.gelu(self.up(tokens)))


class LinearCompression(nn.Module):
    """A learned linear map of the block's tokens, one for all heads; starts as mean pooling.

    Args:
        block_size: tokens in a block, `l`.
        head_dim: channels of a head, `D`.
    """

    def __init__(
        self,
        block_size: int,
        head_dim: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.block_size = block_size
        self.proj = nn.Linear(block_size * head_dim, head_dim, device=device, dtype=dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start as mean pooling."""
        nn.init.zeros_(self.proj.bias)
        with torch.no_grad():
            self.proj.weight.copy_(_mean_weight(self.block_size, self.proj.weight))

    def forward(self, blocks: Tensor) -> Tensor:
        """`[B, C, l, HK, D]` to `[B, C, HK, D]`."""
        return self.proj(blocks.transpose(2, 3).flatten(-2))


_NOISE = 0.02


def _mean_weight(block_size: int, like: Tensor) -> Tensor:
    """The weight `[D, l * D]` with which a linear layer averages a flattened block."""
    identity = torch.eye(like.shape[0], dtype=like.dtype, device=like.device)
    return identity.repeat(1, block_size) / block_size


def compress(
    tokens: Tensor,
    phi: nn.Module | None,
    config: NSAConfig,
    *,
    cu_seqlens: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """The compressed keys or values of `tokens [B, S, HK, D]`: `[B, C, HK, D]`.

    Dense, `C` is exactly `config.num_compressed(S)`. Packed, `C` is an upper bound that needs no
    synchronisation with the device, and rows past the last block are 0.

    Raises:
        ValueError: phi returned another shape than `[B, C, HK, D]`.
    """
    if phi is None:
        packed_blocks = None if cu_seqlens is None else tokens.shape[1] // config.block_stride
        return mean_compress(
            tokens, config, cu_seqlens=cu_seqlens, num_blocks=packed_blocks, backend=backend
        )
    if tokens.shape[1] < config.block_size:
        # phi runs on one block of padding whose result nobody sees: its parameters then get a
        # gradient of 0 rather than none, which sharded training waits for.
        missing = config.block_size - tokens.shape[1]
        padded = functional.pad(tokens, (0, 0, 0, 0, 0, missing))
        return _apply(phi, _dense_blocks(padded, config), tokens)[:, :0]
    if cu_seqlens is None:
        return _apply(phi, _dense_blocks(tokens, config), tokens)
    blocks, exists = _packed_blocks(tokens, config, cu_seqlens)
    return torch.where(exists[:, None, None], _apply(phi, blocks, tokens), 0)


def _apply(phi: nn.Module, blocks: Tensor, tokens: Tensor) -> Tensor:
    compressed = phi(blocks)
    B, C, _, HK, D = blocks.shape
    if compressed.shape != (B, C, HK, D):
        raise ValueError(
            f"phi must map blocks [B, C, l, HK, D] = {list(blocks.shape)} to [B, C, HK, D] = "
            f"{[B, C, HK, D]}, got {list(compressed.shape)} from {type(phi).__name__}"
        )
    return compressed.to(tokens.dtype)


def _dense_blocks(tokens: Tensor, config: NSAConfig) -> Tensor:
    """A view `[B, C, l, HK, D]` of at least `l` tokens."""
    return tokens.unfold(1, config.block_size, config.block_stride).movedim(-1, 2)


def _packed_blocks(tokens: Tensor, config: NSAConfig, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    """The blocks of each packed sequence `[1, C, l, HK, D]`, and which rows exist `[C]`."""
    S, device = tokens.shape[1], tokens.device
    first_block = Layout(S, cu_seqlens, cu_seqlens).compressed_cu_seqlens(config)
    row = torch.arange(S // config.block_stride, dtype=torch.int32, device=device)
    sequence = torch.searchsorted(first_block[1:].contiguous(), row, right=True)
    sequence = sequence.clamp(max=cu_seqlens.numel() - 2)
    start = cu_seqlens[sequence] + (row - first_block[sequence]) * config.block_stride
    index = start[:, None] + torch.arange(config.block_size, device=device)
    return tokens[:, index.clamp(0, S - 1)], row < first_block[-1]
