"""`nsa-port bench`: time and memory of every operator, next to PyTorch's dense causal attention.

Reading order: `shapes` (what is measured, on which inputs), `floors` (the least it can take),
`passes` (the calls), `timing` and `memory` (measuring them), `command` and `plot` (telling).
"""
