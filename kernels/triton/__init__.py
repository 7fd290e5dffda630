"""Every operator of `nsa_port` in Triton, one function each, as `backends/interface.py` asks.

How the kernels are written, once for all files:

| prefix | what it is | example |
|---|---|---|
| `i_` | an index this program works on, a scalar | `i_batch`, `i_tile` |
| `o_` | offsets, a vector of indices | `o_query [BLOCK_M]` |
| `p_` | a pointer or a tile of pointers | `p_k` |
| `b_` | a tile of values in registers | `b_q [BLOCK_M, K_MAIN]` |
| `m_` | a mask | `m_row [BLOCK_M]` |

Capitals are sizes; those that are `tl.constexpr` belong to the model or to a tuned table, never to
a length, and lengths are not specialised on: a new length compiles nothing. Offsets are taken to
int64 before they are multiplied by a stride. A head dimension is cut into a power of two (`MAIN`)
and a smaller power of two (`REST`, often 0), so that 192 is 128 + 64 and not 256. Exponentials are
taken to base 2, with `log2(e)` folded into the scale.

No kernel knows of packed sequences or of given positions: `bounds.py` turns both into the half-open
interval of key rows that each query sees, and everything else works on intervals and rows.
"""

from nsa_port.kernels.triton import interpreter
from nsa_port.kernels.triton.combining import combine, combine_backward
from nsa_port.kernels.triton.compression import mean_compress, mean_compress_backward
from nsa_port.kernels.triton.interval import compressed_attention, window_attention
from nsa_port.kernels.triton.interval_backward import (
    compressed_attention_backward,
    window_attention_backward,
)
from nsa_port.kernels.triton.selected import selected_attention
from nsa_port.kernels.triton.selected_backward import selected_attention_backward
from nsa_port.kernels.triton.selection import select_blocks
from nsa_port.kernels.triton.whole import nsa_attention, nsa_attention_backward

interpreter.repair()

__all__ = [
    "combine",
    "combine_backward",
    "compressed_attention",
    "compressed_attention_backward",
    "mean_compress",
    "mean_compress_backward",
    "nsa_attention",
    "nsa_attention_backward",
    "select_blocks",
    "selected_attention",
    "selected_attention_backward",
    "window_attention",
    "window_attention_backward",
]
