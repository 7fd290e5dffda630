#!/usr/bin/env bash
# The conformance suite (levels 0 to 3) on emulated AMD GPUs, on any machine; the whole of them takes
# about an hour of CPU time.
#   ci/emulated.sh [ARCHITECTURE ...]    by default gfx90a gfx942 gfx950 gfx1100 gfx1201
# PYTHON names an interpreter with torch, triton and numpy (python3), OUT the folder of the reports
# (emulated), JOBS how many architectures run at once (1), LEVEL the highest level (3).
# Fails if one does not conform.
set -euo pipefail
cd "$(dirname "$0")/.."
[ $# -gt 0 ] || set -- gfx90a gfx942 gfx950 gfx1100 gfx1201
export PYTHON=${PYTHON:-python3} OUT=${OUT:-emulated} LEVEL=${LEVEL:-3}
# One thread: the emulator has no use for more. Interpreted kernels would never be compiled.
export OMP_NUM_THREADS=1 PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
unset TRITON_INTERPRET NSA_PORT_BACKEND

run() {
  NSA_PORT_EMULATE=$1 "$PYTHON" -m nsa_port conformance --backend rocm --level "$LEVEL" \
    --out "$OUT/$1" | sed "s/^/$1: /"
}
export -f run
printf '%s\0' "$@" | xargs -0 -n 1 -P "${JOBS:-1}" bash -c 'set -o pipefail; run "$1"' run
