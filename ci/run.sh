#!/usr/bin/env bash
# Set-up and the main jobs of this repository on a fresh machine; needs bash and Python 3.10 to 3.13.
#   ci/run.sh demo [ARGUMENTS]    train a small language model with NSA next to a dense one
#   ci/run.sh test [ARGUMENTS]    formatting, types, and the tests (arguments go to pytest)
# PYTHON names the interpreter (python3), VENV the environment it makes or reuses (.venv).
set -euo pipefail
cd "$(dirname "$0")/.."
job=${1:-}
[ $# -eq 0 ] || shift
case "$job" in
  demo) extras=demo ;;
  test) extras=dev ;;
  *) sed -n '2,6s/^# \{0,1\}//p' "$0" >&2; exit 2 ;;
esac

venv=${VENV:-.venv}
[ -x "$venv/bin/python" ] || "${PYTHON:-python3}" -m venv "$venv"
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check \
  --constraint ci/constraints.txt --editable ".[$extras]"
export PATH="$PWD/$venv/bin:$PATH"
[ "${venv#/}" = "$venv" ] || export PATH="$venv/bin:$PATH"

if [ "$job" = demo ]; then
  exec nsa-port demo "$@"
fi
ruff format --check
ruff check
mypy
# One thread a worker: the tests are many and small.
export OMP_NUM_THREADS=1
exec python -m pytest -n 2 --dist worksteal "$@"
