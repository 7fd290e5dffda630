"""Which of the two forms of the PyTorch kernels a call takes."""

from __future__ import annotations

FEW_QUERIES = 16


def takes_block_major(device_type: str, num_queries: int) -> bool:
    """Whether to read the chosen blocks on the host and work through them one key block at a time.

    Only a CPU lets the host look at data for nothing. For a few queries, as in decoding, gathering
    their blocks takes fewer operations than looping over blocks.
    """
    return device_type == "cpu" and num_queries > FEW_QUERIES
