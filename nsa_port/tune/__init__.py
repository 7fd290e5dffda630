"""`nsa-port tune`: which tuned values are fastest on the machine at hand.

Reading order: `candidates` (what is tried), `compile_only` and `machine_code` (what is out before
it runs), `calls` (what runs, and whether it is right), `trial` (one candidate), `search` (all
of them), `result` and `command` (telling).
"""
