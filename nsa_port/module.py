"""Native Sparse Attention as a layer: projections, phi, RoPE and gates around `nsa_attention`."""

from __future__ import annotations

import copy
from functools import partial

import torch
from torch import Tensor, nn

from nsa_port.cache import Lengths, NSACache
from nsa_port.compression import LinearCompression, MLPCompression, compress
from nsa_port.functional import nsa_attention
from nsa_port.kernels.geometry import Layout, NSAConfig
from nsa_port.rotary import rotary_angles, rotate

COMPRESSIONS = ("mlp", "linear", "mean")


class NativeSparseAttention(nn.Module):
    """Causal self-attention `[B, T, hidden_size]` to the same, by Native Sparse Attention.

    Keys and values are projected three times, for the compressed, the selected and the window
    branch (section 3.3.3 of arXiv 2502.11089); the gates come from an MLP with a sigmoid (Eq. 5).
    Where RoPE is asked for, it turns queries and all keys, so that phi too sees rotated keys: a
    branch's keys are the same everywhere, which `shared_kv` relies on.

    Output channels are ordered by head first (`k_proj`: head, then set, then channel; the last
    gate layer: head, then branch), so that sharding them by rows shards heads.

    Args:
        hidden_size: channels of input and output.
        num_heads: query heads, `H`.
        num_kv_heads: key/value heads, `HK`; divides `num_heads`.
        head_dim: channels of queries and keys, `Dk`.
        v_head_dim: channels of values, `Dv`; `head_dim` by default.
        config: the block geometry; the paper's by default.
        compression: phi, see `nsa_port.compression`. `"mlp"` (the paper's), `"linear"`, `"mean"`,
            or a module from blocks `[B, C, l, HK, D]` to `[B, C, HK, D]`. Keys use the module that
            is given, values a deep copy of it; a pair is one for the keys and one for the values.
        shared_kv: project one key/value set for all three branches.
        rotary_dim: how many of the first channels of each head RoPE turns; None for no RoPE.
        rope_theta: the base of RoPE's frequencies.
        gate_hidden_size: hidden units of the gates' MLP; a quarter of `hidden_size` by default.
        bias: whether the projections of queries, keys, values and output have a bias.
        scale: what logits are multiplied with; `head_dim ** -0.5` by default.
        backend: forces a backend, see `nsa_port.backends()`.
        device, dtype: of the parameters.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        v_head_dim: int | None = None,
        config: NSAConfig | None = None,
        compression: str | nn.Module | tuple[nn.Module, nn.Module] = "mlp",
        *,
        shared_kv: bool = False,
        rotary_dim: int | None = None,
        rope_theta: float = 10000.0,
        gate_hidden_size: int | None = None,
        bias: bool = False,
        scale: float | None = None,
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        v_head_dim = head_dim if v_head_dim is None else v_head_dim
        if gate_hidden_size is None:
            gate_hidden_size = max(1, hidden_size // 4)
        sizes = {
            "hidden_size": hidden_size,
            "num_heads": num_heads,
            "num_kv_heads": num_kv_heads,
            "head_dim": head_dim,
            "v_head_dim": v_head_dim,
            "gate_hidden_size": gate_hidden_size,
        }
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}")
        if num_heads % num_kv_heads:
            raise ValueError(
                f"num_kv_heads must divide num_heads, got {num_kv_heads} and {num_heads}"
            )
        if rotary_dim is not None and (rotary_dim % 2 or not 0 < rotary_dim <= head_dim):
            raise ValueError(
                f"rotary_dim must be even and in 2 .. head_dim={head_dim}, got {rotary_dim}"
            )
        self.hidden_size = hidden_size
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.head_dim = head_dim
        self.v_head_dim = v_head_dim
        self.config = NSAConfig() if config is None else config
        self.shared_kv = shared_kv
        self.rotary_dim = rotary_dim
        self.rope_theta = rope_theta
        self.scale = scale
        self.backend = backend

        sets = 1 if shared_kv else 3
        linear = partial(nn.Linear, device=device, dtype=dtype)
        self.q_proj = linear(hidden_size, num_heads * head_dim, bias=bias)
        self.k_proj = linear(hidden_size, num_kv_heads * sets * head_dim, bias=bias)
        self.v_proj = linear(hidden_size, num_kv_heads * sets * v_head_dim, bias=bias)
        self.o_proj = linear(num_heads * v_head_dim, hidden_size, bias=bias)
        self.gate = nn.Sequential(
            linear(hidden_size, gate_hidden_size),
            nn.SiLU(),
            linear(gate_hidden_size, 3 * num_heads),
        )
        self.phi_k, self.phi_v = _make_phi(
            compression, self.config.block_size, (head_dim, v_head_dim), device, dtype
        )

    def extra_repr(self) -> str:
        return (
            f"num_heads={self.num_heads}, num_kv_heads={self.num_kv_heads}, "
            f"head_dim={self.head_dim}, v_head_dim={self.v_head_dim}, "
            f"shared_kv={self.shared_kv}, rotary_dim={self.rotary_dim}, config={self.config}"
        )

    def forward(
        self,
        x: Tensor,
        *,
        cu_seqlens: Tensor | None = None,
        cache: NSACache | None = None,
        lengths: Lengths | None = None,
    ) -> Tensor:
        """Attend within each batch entry, or within each packed sequence.

        Args:
            x: `[B, T, hidden_size]`.
            cu_seqlens: int32 `[N + 1]`, packs N sequences in a batch of 1.
            cache: what came before `x`; `x` is appended to it. For inference: the result carries
                no gradient.
            lengths: only with a cache: how many of the T rows each entry really has, as one
                number, a list or a tensor (reading a device tensor synchronises). The rest is
                padding, whose output is 0.

        Returns:
            `[B, T, hidden_size]`.

        Raises:
            ValueError: shapes or devices do not fit, or the cache is full; it is unchanged then.
            TypeError: dtypes do not fit.
            RuntimeError: a gradient through the cache is asked for.
        """
        if x.dim() != 3 or x.shape[2] != self.hidden_size:
            raise ValueError(f"x must be [B, T, {self.hidden_size}], got {list(x.shape)}")
        if cache is not None:
            if cu_seqlens is not None:
                raise ValueError("a cache takes a batch, not packed sequences: drop cu_seqlens")
            return self._forward_cached(x, cache, lengths)
        if lengths is not None:
            raise ValueError("lengths needs a cache; pack sequences with cu_seqlens instead")
        positions = None
        if self.rotary_dim is not None:
            layout = Layout(x.shape[1], cu_seqlens, cu_seqlens)
            positions = layout.query_positions(x.shape[1], x.device)
        q, k, v = self._project(x, positions)
        raw_k, k_slc, k_win = k.expand(3, -1, -1, -1, -1)
        raw_v, v_slc, v_win = v.expand(3, -1, -1, -1, -1)
        out = nsa_attention(
            q,
            compress(raw_k, self.phi_k, self.config, cu_seqlens=cu_seqlens, backend=self.backend),
            compress(raw_v, self.phi_v, self.config, cu_seqlens=cu_seqlens, backend=self.backend),
            k_slc,
            v_slc,
            k_win,
            v_win,
            self._gates(x),
            self.config,
            scale=self.scale,
            cu_seqlens=cu_seqlens,
            backend=self.backend,
        )
        return self.o_proj(out.flatten(2))

    def new_cache(
        self,
        batch_size: int,
        max_length: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> NSACache:
        """An empty cache for this layer.

        Args:
            batch_size: batch entries.
            max_length: the most tokens of an entry.
            device: the parameters' by default.
            dtype: what the layer computes in: autocast's dtype or the parameters' by default.
        """
        weight = self.k_proj.weight
        if dtype is None:
            kind = weight.device.type
            autocast = torch.is_autocast_enabled(kind)
            dtype = torch.get_autocast_dtype(kind) if autocast else weight.dtype
        return NSACache(
            self.config,
            batch_size,
            max_length,
            self.num_kv_heads,
            self.head_dim,
            self.v_head_dim,
            shared_kv=self.shared_kv,
            device=weight.device if device is None else device,
            dtype=dtype,
        )

    def _forward_cached(self, x: Tensor, cache: NSACache, lengths: Lengths | None) -> Tensor:
        if torch.is_grad_enabled() and x.requires_grad:
            raise RuntimeError(
                "no gradient flows through a cache: call under torch.no_grad(), or detach x"
            )
        B, T, _ = x.shape
        if cache.batch_size != B:
            raise ValueError(f"the cache has batch size {cache.batch_size}, x has {B}")
        if cache.config != self.config:
            raise ValueError(f"the cache is made for {cache.config}, the layer for {self.config}")
        if cache.device != x.device:
            raise ValueError(f"the cache is on {cache.device}, x on {x.device}")
        with torch.no_grad(), cache.append(T, lengths) as step:
            positions = step.positions
            if positions is None:
                assert step.start is not None
                stop = step.start + T
                positions = torch.arange(step.start, stop, device=x.device)[None]
            q, k, v = self._project(x, positions)
            stored = cache.write(
                step,
                k,
                v,
                partial(compress, phi=self.phi_k, config=self.config, backend=self.backend),
                partial(compress, phi=self.phi_v, config=self.config, backend=self.backend),
            )
            out = nsa_attention(
                q,
                *stored,
                self._gates(x),
                self.config,
                scale=self.scale,
                positions=step.positions,
                backend=self.backend,
            )
            y = self.o_proj(out.flatten(2))
            if step.positions is not None:
                y = y.masked_fill((step.positions < 0)[:, :, None], 0)
            return y

    def _project(self, x: Tensor, positions: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """q `[B, T, H, Dk]`, keys `[sets, B, T, HK, Dk]`, values `[sets, B, T, HK, Dv]`."""
        sets = 1 if self.shared_kv else 3
        q = self.q_proj(x).unflatten(-1, (-1, self.head_dim))
        k = self.k_proj(x).unflatten(-1, (-1, self.head_dim))
        v = self.v_proj(x).unflatten(-1, (-1, sets, self.v_head_dim))
        if self.rotary_dim is not None:
            assert positions is not None
            cos, sin = rotary_angles(positions, self.rotary_dim, self.rope_theta, q.dtype)
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        k = k.unflatten(2, (-1, sets))
        return q, k.permute(3, 0, 1, 2, 4), v.permute(3, 0, 1, 2, 4)

    def _gates(self, x: Tensor) -> Tensor:
        """`[B, T, H, 3]`: compressed, selected, window."""
        return self.gate(x).unflatten(-1, (-1, 3)).sigmoid()


def _make_phi(
    compression: str | nn.Module | tuple[nn.Module, nn.Module],
    block_size: int,
    dims: tuple[int, int],
    device: torch.device | str | None,
    dtype: torch.dtype | None,
) -> tuple[nn.Module | None, nn.Module | None]:
    """phi of the keys and phi of the values; None is mean pooling."""
    if isinstance(compression, nn.Module):
        return compression, copy.deepcopy(compression)
    if isinstance(compression, tuple):
        phi_k, phi_v = compression
        return phi_k, phi_v
    if compression == "mean":
        return None, None
    if compression == "mlp":
        phi_k, phi_v = (MLPCompression(block_size, D, device=device, dtype=dtype) for D in dims)
        return phi_k, phi_v
    if compression == "linear":
        phi_k, phi_v = (LinearCompression(block_size, D, device=device, dtype=dtype) for D in dims)
        return phi_k, phi_v
    raise ValueError(
        f"compression must be a module, a pair of modules or one of {COMPRESSIONS}, "
        f"got {compression!r}"
    )
