#!/usr/bin/env bash
# Sets everything up in .venv-demo and runs the demo; arguments go to `qdiff demo`.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh
make_environment .venv-demo ".[cpu,plots]" # without numba the CPU would run the reference, slower than 16 bits
.venv-demo/bin/qdiff demo -o demo "$@"
