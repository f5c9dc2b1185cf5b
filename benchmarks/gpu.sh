#!/usr/bin/env bash
# All that a GPU is needed for, in at most 12 minutes on one H200: the tests that are marked gpu, then
# speed, memory and precision, written to docs/benchmarks_gpu.md. `benchmarks/gpu.sh --help` says more.
# It takes the Python of PYTHON=..., of .venv, or python3; it installs nothing. It needs torch and
# NumPy; a part that needs more is left out where that is not installed.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [[ -z "${PYTHON:-}" ]]; then
  PYTHON=python3
  [[ -x .venv/bin/python ]] && PYTHON=.venv/bin/python
fi
exec "$PYTHON" -m benchmarks.gpu "$@"
