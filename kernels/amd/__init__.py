"""The operators on AMD GPUs: `nsa_port.kernels.triton`'s, except where AMD asks for others.

What differs only in numbers is a table under `kernels/configs/`; what differs in kind is a file
here, and says where it serves. Everywhere else, in Triton's interpreter too, the shared kernels do.
"""

from nsa_port.kernels.amd.combining import combine, combine_backward
from nsa_port.kernels.amd.compression import mean_compress, mean_compress_backward
from nsa_port.kernels.amd.selected import selected_attention
from nsa_port.kernels.amd.selection import select_blocks
from nsa_port.kernels.amd.whole import nsa_attention
from nsa_port.kernels.triton import (
    compressed_attention,
    compressed_attention_backward,
    nsa_attention_backward,
    selected_attention_backward,
    window_attention,
    window_attention_backward,
)

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
