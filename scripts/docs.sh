#!/usr/bin/env bash
# Builds the documentation's site into site/, or shows it: bash scripts/docs.sh [build | serve] [MKDOCS_ARGUMENT ...]
#
# Any warning is an error: a link that leads nowhere, a page that the menu lacks, a docstring with an unknown argument.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh
make_environment .venv-test --editable ".[docs]"
command="${1:-build}"
[ $# = 0 ] || shift
NO_MKDOCS_2_WARNING=1 .venv-test/bin/python -m mkdocs "$command" --strict "$@"
