"""The suite that every backend of `nsa_port` is held to, built in or plugged in.

    nsa-port conformance --backend NAME --level L --out DIR
    NSA_PORT_BACKEND=NAME pytest --pyargs nsa_port.conformance

Each case calls the public functions with the backend forced and compares what comes back with the
float64 reference (`tolerance` says how close is close enough) or checks a property of the results.

| level | what it shows |
|---|---|
| 0 | imports, the registry knows the backend, its refusals are reasons |
| 1 | forward |
| 2 | backward |
| 3 | packed, S > T, positions, strides, lengths, groups, what other implementations lack |
| 4 | determinism, causality, batch invariance, opcheck, compile, graphs, prefill = decode |
| 5 | scale: long sequences, offsets past 2^31, memory that grows linearly |

A case passes, fails, or is unsupported with the codes the backend itself gave to dispatch. Within
the level that a backend declares, unsupported is a breach.
"""

from __future__ import annotations

SUITE_VERSION = "1.0"
"""Rises with every change of what a case demands, so that results can be compared."""

LEVELS = {
    0: "import, registry, reasons",
    1: "forward",
    2: "backward",
    3: "layouts and shapes",
    4: "behaviour",
    5: "scale",
}
"""What each level is about, in a few words."""
