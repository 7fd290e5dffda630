#!/usr/bin/env bash
# On a machine with an NVIDIA GPU: hold the backend `cuda` to the suite, check memory and races, time
# it next to its targets and to dense attention. Everything is written to a folder.
#   ci/cuda.sh [FOLDER]    the report's folder, by default cuda-report
# PYTHON names an interpreter with torch, triton, numpy, pytest and pytest-xdist (python3), JOBS over
# how many processes the suite, the operators' tests and random calls are spread (8), STEPS which of
# "facts first suite operators random sanitizer targets bench tune" to run, LEVEL the suite's (5). A
# step that fails does not stop the others; fails if one does.
set -uo pipefail
cd "$(dirname "$0")/.."
report=${1:-cuda-report}
steps=" ${STEPS:-facts first suite operators random sanitizer targets bench tune} "
python=${PYTHON:-python3} failed=0
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
unset TRITON_INTERPRET NSA_PORT_BACKEND NSA_PORT_TABLES
mkdir -p "$report"

# step NAME COMMAND...: run it and keep what it prints in NAME.log.
step() {
  local name=$1 start=$SECONDS
  [[ $steps == *" ${name%%-*} "* ]] || return 0
  shift
  "$@" >"$report/$name.log" 2>&1
  local code=$?
  [ "$code" = 0 ] || failed=1
  echo "$name: exit code $code after $((SECONDS - start)) s"
}

step facts "$python" -m nsa_port info
cold=$(mktemp -d)
step first env TRITON_CACHE_DIR="$cold" "$python" ci/cuda_first.py
rm -rf "$cold"
step suite "$python" -m nsa_port conformance --backend cuda --level "${LEVEL:-5}" \
  --jobs "${JOBS:-8}" --out "$report/suite"
step operators "$python" -m pytest -q -n "${JOBS:-8}" -p no:cacheprovider tests/triton_operators.py
step random "$python" ci/random_calls.py --backend cuda --jobs "${JOBS:-8}"
# Small shapes of every kernel: the sanitizer is a hundred times slower.
small="the_whole_and_its_gradients and (packed or holes or group_of_5)"
small="$small or programs_of_many_tiles"
for tool in memcheck racecheck; do
  step "sanitizer-$tool" compute-sanitizer --tool "$tool" --error-exitcode 9 \
    --target-processes all "$python" -m pytest -q -p no:cacheprovider tests/triton_operators.py \
    -k "$small"
done
step targets "$python" ci/cuda_targets.py --out "$report/targets.json"
step bench "$python" -m nsa_port bench --backend cuda --shapes A2 --lengths 8192 16384 32768 65536 \
  --rounds 9 --out "$report/bench.json" --plot "$report/bench.png"
# One kernel is enough to see that a table comes out and is taken.
mkdir -p "$report/tables"
step tune env -C "$report/tables" "$python" -m nsa_port tune --backend cuda \
  --kernels interval_forward --length 8192
NSA_PORT_TABLES=$report/tables step tune-taken bash -o pipefail -c \
  '"$0" -m nsa_port info | grep "^tables .*/tables/"' "$python"
exit "$failed"
