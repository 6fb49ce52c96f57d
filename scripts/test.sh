#!/usr/bin/env bash
# Sets everything up in .venv-test and runs the tests; arguments go to pytest.
#
# First on all cores (QDIFF_WORKERS says how many), then, by themselves, those marked `serial`.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh
make_environment .venv-test --editable ".[dev]"
# Without a GPU the Triton kernels are interpreted, which has to be said before anything imports Triton.
command -v nvidia-smi > /dev/null || export TRITON_INTERPRET=1

NO_TESTS=5 # pytest's exit code when the arguments select none
pass() { # PYTEST_ARGUMENT...: one pass; fails unless its tests passed or there were none
    local code=0
    .venv-test/bin/python -m pytest "$@" || code=$?
    found+=("$code")
    [ "$code" = 0 ] || [ "$code" = "$NO_TESTS" ]
}

found=()
failed=0
pass --numprocesses "${QDIFF_WORKERS:-logical}" --maxprocesses 8 --dist worksteal -m "not serial" --durations 20 -r s "$@" || failed=1
pass -m serial --durations 20 -r s "$@" || failed=1
[ "${found[*]}" != "$NO_TESTS $NO_TESTS" ] || failed=$NO_TESTS
exit "$failed"
