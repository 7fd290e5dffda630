"""All of `nsa_attention` (Eq. 5) at once, with the parts that AMD has of its own."""

from __future__ import annotations

from functools import partial

from nsa_port.kernels.amd.combining import combine
from nsa_port.kernels.amd.selected import attend_selected
from nsa_port.kernels.amd.selection import blocks_of
from nsa_port.kernels.triton import whole

nsa_attention = partial(
    whole.nsa_attention, blocks_of=blocks_of, attend_selected=attend_selected, combine=combine
)
