#!/usr/bin/env bash
# Sets everything up in .venv-test and runs the tests; arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh
make_environment .venv-test --editable ".[dev]"
.venv-test/bin/python -m pytest "$@"
