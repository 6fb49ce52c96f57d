# Sourced by the other scripts: make_environment FOLDER REQUIREMENT... creates a virtual environment and installs into it.
# QDIFF_TORCH chooses the torch to install, for example "torch" for the newest CUDA build; PYTHON the interpreter.
# constraints.txt holds the versions with which everything has passed; QDIFF_UNPINNED=1 takes the newest instead.

make_environment() {
    local folder="$1"
    shift
    if [ ! -x "$folder/bin/python" ]; then
        "${PYTHON:-python3}" -m venv "$folder" || {
            echo "python3 -m venv failed; on Debian: apt-get install python3-venv" >&2
            return 1
        }
    fi
    local versions=()
    if [ -f constraints.txt ] && [ -z "${QDIFF_UNPINNED:-}" ]; then versions=(--constraint constraints.txt); fi
    # torch first and by itself, so that no other package's requirement picks a larger build.
    "$folder/bin/pip" install --quiet --disable-pip-version-check "${versions[@]}" "${QDIFF_TORCH:-torch==2.13.0}"
    "$folder/bin/pip" install --quiet --disable-pip-version-check "${versions[@]}" "$@"
}
