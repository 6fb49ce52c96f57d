#!/usr/bin/env bash
# Sets everything up in .venv-test and runs the tests; arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh
make_environment .venv-test --editable ".[dev]"
# Without a GPU the Triton kernels are interpreted, which has to be said before anything imports Triton.
command -v nvidia-smi > /dev/null || export TRITON_INTERPRET=1
.venv-test/bin/python -m pytest "$@"
