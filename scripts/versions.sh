#!/usr/bin/env bash
# Builds one environment per row of the version matrix, runs a quick part of the tests in each and writes
# benchmarks/results/versions.md. Arguments choose rows: bash scripts/versions.sh oldest newest
#
# QDIFF_TORCH_OLDEST and the like replace a row's torch, for example by a CPU build: QDIFF_TORCH_TORCH211="torch==2.11.0+cpu".
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh

# What pyproject.toml allows at least. diffusers 0.40 needs huggingface_hub 1.23 of its own accord.
oldest=("torch==2.6.0" "diffusers==0.40.0" "transformers==5.0.0" "huggingface-hub==1.23.0" "accelerate==1.0.0" "peft==0.17.0"
    "safetensors==0.5.0" "numpy<2.4")
# The oldest of everything but torch, which has no small build for every version.
libraries=("torch==2.13.0" "${oldest[@]:1}")
# The newest pair with huggingface_hub 1.x, and the triton that belongs to this torch.
torch211=("torch==2.11.0" "triton==3.6.0" "diffusers==0.41.0" "huggingface-hub<2" "transformers" "accelerate" "peft" "numpy<2.4")
newest=("torch" "diffusers" "transformers" "huggingface-hub" "accelerate" "peft" "triton" "numpy")

TESTS=(tests/test_round_trip.py tests/test_single_file.py tests/test_text_encoders.py tests/test_lora.py)
SELECTION="(survives and dit and float32 and (rtn-4 or fp-nvfp4 or svdquant-4)) or (single and rtn) or (encoder and rtn) or fused"

row() {
    local name="$1" requirements="$1[@]" folder=".venv-versions/$1" override="QDIFF_TORCH_${1^^}"
    local packages=("${!requirements}")
    echo "== $name: ${packages[*]}"
    QDIFF_TORCH="${!override:-${packages[0]}}" make_environment "$folder" "${packages[@]:1}" pytest "hypothesis>=6.100" || return 1
    "$folder/bin/pip" install --quiet --disable-pip-version-check --editable . || return 1
    OMP_NUM_THREADS=1 "$folder/bin/python" -m pytest "${TESTS[@]}" -k "$SELECTION" -p no:cacheprovider | tee "$folder/log" || true
    "$folder/bin/python" scripts/versions.py "$name" "$folder/log"
}

for name in "${@:-oldest libraries torch211 newest}"; do
    for each in $name; do
        row "$each" || python3 scripts/versions.py "$each" "" "the environment could not be built on this machine"
    done
done
