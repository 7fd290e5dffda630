"""A small byte-level language model whose attention is NSA or dense, for the demonstration."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from nsa_port.cache import NSACache
from nsa_port.kernels.geometry import NSAConfig
from nsa_port.module import NativeSparseAttention
from nsa_port.rotary import rotary_angles, rotate

VOCABULARY = 256


@dataclass(frozen=True, slots=True)
class ModelSize:
    """What the dense and the sparse model have in common."""

    layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int


class DenseAttention(nn.Module):
    """Causal self-attention with RoPE by PyTorch's `scaled_dot_product_attention`."""

    def __init__(self, size: ModelSize) -> None:
        super().__init__()
        self.head_dim = size.head_dim
        queries, keys = size.num_heads * size.head_dim, size.num_kv_heads * size.head_dim
        self.q_proj = nn.Linear(size.hidden_size, queries, bias=False)
        self.k_proj = nn.Linear(size.hidden_size, keys, bias=False)
        self.v_proj = nn.Linear(size.hidden_size, keys, bias=False)
        self.o_proj = nn.Linear(queries, size.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, T, hidden_size]` to the same."""
        q, k, v = (
            project(x).unflatten(-1, (-1, self.head_dim))
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        positions = torch.arange(x.shape[1], device=x.device)[None]
        cos, sin = rotary_angles(positions, self.head_dim, 10000.0, q.dtype)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        out = functional.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True, enable_gqa=True
        )
        return self.o_proj(out.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Attention and an MLP, each on a normalised residual stream."""

    def __init__(self, size: ModelSize, attention: nn.Module) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(size.hidden_size)
        self.attention = attention
        self.mlp_norm = nn.RMSNorm(size.hidden_size)
        self.mlp = nn.Sequential(
            nn.Linear(size.hidden_size, 4 * size.hidden_size, bias=False),
            nn.GELU(),
            nn.Linear(4 * size.hidden_size, size.hidden_size, bias=False),
        )

    def forward(self, x: Tensor, cache: NSACache | None = None) -> Tensor:
        """`[B, T, hidden_size]` to the same."""
        options = {} if cache is None else {"cache": cache}
        x = x + self.attention(self.attention_norm(x), **options)
        return x + self.mlp(self.mlp_norm(x))


class ByteLanguageModel(nn.Module):
    """Predicts the next byte; its output layer is the transposed embedding.

    Args:
        size: the sizes.
        config: NSA's block geometry; None makes the attention dense.
    """

    def __init__(self, size: ModelSize, config: NSAConfig | None) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, size.hidden_size)
        nn.init.normal_(self.embedding.weight, std=0.02)
        self.blocks = nn.ModuleList(
            Block(size, _attention(size, config)) for _ in range(size.layers)
        )
        self.norm = nn.RMSNorm(size.hidden_size)

    def forward(self, tokens: Tensor, caches: list[NSACache] | None = None) -> Tensor:
        """Bytes `[B, T]` to logits `[B, T, 256]`; with `caches`, bytes after the cached ones."""
        x = self.embedding(tokens)
        for i, block in enumerate(self.blocks):
            x = block(x, None if caches is None else caches[i])
        return functional.linear(self.norm(x), self.embedding.weight)

    def loss(self, tokens: Tensor) -> Tensor:
        """Mean cross entropy, in nats, of predicting each byte of `[B, T + 1]` but the first."""
        logits = self(tokens[:, :-1])
        return functional.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())

    def new_caches(self, batch_size: int, max_length: int) -> list[NSACache]:
        """One cache for each layer; only NSA has them."""
        caches = []
        for block in self.blocks:
            assert isinstance(block, Block)
            assert isinstance(block.attention, NativeSparseAttention), "dense has no cache"
            caches.append(block.attention.new_cache(batch_size, max_length))
        return caches

    @torch.no_grad()
    def generate(
        self, prompt: Tensor, num_tokens: int, temperature: float, generator: torch.Generator
    ) -> Tensor:
        """Sample `num_tokens` bytes after `prompt [B, T]` through the cache: `[B, num_tokens]`."""
        caches = self.new_caches(prompt.shape[0], prompt.shape[1] + num_tokens)
        sampled: list[Tensor] = []
        step = prompt
        for _ in range(num_tokens):
            probabilities = (self(step, caches)[:, -1].float() / temperature).softmax(-1)
            step = torch.multinomial(probabilities, 1, generator=generator)
            sampled.append(step)
        return torch.cat(sampled, dim=1)


def _attention(size: ModelSize, config: NSAConfig | None) -> nn.Module:
    if config is None:
        return DenseAttention(size)
    return NativeSparseAttention(
        size.hidden_size,
        size.num_heads,
        size.num_kv_heads,
        size.head_dim,
        config=config,
        rotary_dim=size.head_dim,
    )
