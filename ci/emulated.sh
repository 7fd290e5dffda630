#!/usr/bin/env bash
# On any machine: the backend `rocm` on emulated AMD GPUs, held to the conformance suite and to the
# operators' own tests, with every access checked and data races between workgroups reported.
#   ci/emulated.sh [ARCHITECTURE ...]    by default gfx90a gfx942 gfx950 gfx1100 gfx1201
# PYTHON names an interpreter with torch, triton, numpy and pytest (python3), OUT the folder of the
# reports (emulated), JOBS the number of processes (1; more need pytest-xdist), LEVEL the suite's (3).
# Fails if one architecture does.
set -uo pipefail
cd "$(dirname "$0")/.."
[ $# -gt 0 ] || set -- gfx90a gfx942 gfx950 gfx1100 gfx1201
python=${PYTHON:-python3} out=${OUT:-emulated} jobs=${JOBS:-1} failed=()
# The emulator has no use for more threads, and kernels that are interpreted are not compiled.
export OMP_NUM_THREADS=1 PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
unset TRITON_INTERPRET NSA_PORT_BACKEND NSA_PORT_TABLES

parallel=()
[ "$jobs" = 1 ] || parallel=(-n "$jobs" --dist worksteal)
for arch in "$@"; do
  export NSA_PORT_EMULATE=$arch
  "$python" -m nsa_port conformance --backend rocm --level "${LEVEL:-3}" --jobs "$jobs" \
    --out "$out/$arch" || failed+=("$arch (suite)")
  "$python" -m pytest -p no:cacheprovider "${parallel[@]}" --junit-xml "$out/$arch/operators.xml" \
    tests/triton_operators.py || failed+=("$arch (operators)")
done
[ ${#failed[@]} -eq 0 ] && exit
printf 'failed: %s\n' "${failed[@]}" >&2
exit 1
