#!/usr/bin/env bash
# On a machine with an AMD GPU: install, hold the backend `rocm` to the suite, tune, time, and pack
# a report to send back. Nothing is sent anywhere.
#   ci/amd.sh [FOLDER]    the report's folder, by default amd-report; packed as FOLDER.tar.gz
# PYTHON names an interpreter that has torch for ROCm and the Triton that came with it (python3);
# both are used as they are. VENV is the environment made over it (.venv-amd), STEPS which of
# "facts suite operators random tune tuned bench" to run, LEVEL the suite's (5), LIMIT seconds a step
# (7200). A step that fails is told in the report and does not stop the others; fails if results are
# wrong.
# Without a GPU, NSA_PORT_EMULATE=gfx942 STEPS="facts suite" LEVEL=0 tries the script itself.
set -uo pipefail
cd "$(dirname "$0")/.."
report=${1:-amd-report}
steps=" ${STEPS:-facts suite operators random tune tuned bench} "
venv=${VENV:-.venv-amd} level=${LEVEL:-5} limit=${LIMIT:-7200} failed=0
unset TRITON_INTERPRET NSA_PORT_BACKEND NSA_PORT_TABLES

if ! "${PYTHON:-python3}" - <<'PY'
import os, sys
try:
    import torch
except ImportError:
    sys.exit("no torch here: install it from https://download.pytorch.org/whl/rocm<version>")
if os.environ.get("NSA_PORT_EMULATE"):
    sys.exit()
if torch.version.hip is None:
    sys.exit(f"torch {torch.__version__} is not built for ROCm")
if not torch.cuda.is_available():
    sys.exit(f"torch {torch.__version__} sees no GPU: are rocm-smi and /dev/kfd usable for you?")
PY
then exit 2; fi

# Over the folder that torch is in (also where that is an environment itself), and without
# dependencies: pip must not replace torch or Triton.
if [ ! -x "$venv/bin/python" ]; then
  "${PYTHON:-python3}" -m venv "$venv" || exit 2
  site=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
  "${PYTHON:-python3}" -c 'import pathlib, torch; print(pathlib.Path(torch.__file__).parent.parent)' \
    >"$site/torch.pth" || exit 2
fi
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check \
  "setuptools>=77" "packaging>=22" "numpy>=1.26" "pytest>=8" || exit 2
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check \
  --no-deps --no-build-isolation --editable . || exit 2
export PATH="$(cd "$venv" && pwd)/bin:$PATH"
mkdir -p "$report/tables"
report=$(cd "$report" && pwd)
printf 'step\tseconds\texit code\n' >"$report/steps.tsv"

# step NAME COMMAND...: run it, keep what it prints in NAME.log, note how long it took and its exit code.
step() {
  local name=$1 start=$SECONDS code
  shift
  echo "== $name: $*"
  timeout "$limit" "$@" 2>&1 | tee "$report/$name.log"
  code=${PIPESTATUS[0]}
  printf '%s\t%s\t%s\n' "$name" $((SECONDS - start)) "$code" >>"$report/steps.tsv"
  return "$code"
}

wanted() { [[ $steps == *" $1 "* ]]; }

if wanted facts; then
  step info nsa-port info --json
  step commit git log -1 --format='%H %cI'
  for tool in rocminfo rocm-smi amd-smi; do
    command -v "$tool" >/dev/null || continue
    arguments=()
    [ "$tool" != amd-smi ] || arguments=(static)
    [ "$tool" != rocm-smi ] || arguments=(--showproductname --showdriverversion
      --showcomputepartition --showmemorypartition)
    step "$tool" "$tool" "${arguments[@]}"
  done
fi
if wanted suite; then
  step suite nsa-port conformance --backend rocm --level "$level" --out "$report/suite" || failed=1
fi
if wanted operators; then
  step operators python -m pytest -q -p no:cacheprovider tests/triton_operators.py || failed=1
fi
if wanted random; then
  step random python ci/random_calls.py --backend rocm --seconds 600 || failed=1
fi
if wanted tune; then
  arch=$(python -c "import torch
from nsa_port import environment
found = environment.probe(environment.default_device())
print(found.arch or found.emulate)")
  step tune nsa-port tune --backend rocm --out "$report/tables/$arch.json"
fi
if wanted tuned && compgen -G "$report/tables/*.json" >/dev/null; then
  # What was tuned must hold too before anyone trusts its times.
  export NSA_PORT_TABLES=$report/tables
  step tuned nsa-port conformance --backend rocm --level 3 --out "$report/tuned" || failed=1
fi
if wanted bench; then
  for dtype in bfloat16 float32; do
    step "bench-$dtype" nsa-port bench --backend rocm --dtype "$dtype" --shapes A1 A2 \
      --lengths 4096 16384 65536 --decode --out "$report/bench-$dtype.json"
  done
fi

tar -czf "$report.tar.gz" -C "$(dirname "$report")" "$(basename "$report")"
column -t -s $'\t' "$report/steps.tsv" 2>/dev/null || cat "$report/steps.tsv"
echo "Report: $report.tar.gz. Please attach it to an issue."
exit "$failed"
