"""Lays the kernels out as the Hub serves them: one folder per backend, ops under a namespace of their own.

    python kernels/package.py OUTPUT        # OUTPUT/build/torch-cuda, torch-rocm, ... and CARD.md as README.md

The kernel-builder does the same from ``build.toml`` when a release is published; this one needs nothing but Python and lets anybody
load the folder with ``kernels.get_local_kernel``.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import shutil
from pathlib import Path

SOURCE = Path(__file__).parent
PACKAGE = SOURCE / "torch-ext" / "qdiff_kernels"


def package(output: Path) -> list[Path]:
    """Write the layout below ``output``, which must not hold a build yet; returns the folders of the backends."""
    build = output / "build"
    if build.exists():
        raise FileExistsError(f"{build} is there already: remove it, or choose another output folder")
    text = (SOURCE / "build.toml").read_text()
    name = re.search(r'name = "(.+)"', text)
    backends = re.search(r"backends = \[(.+)\]", text)
    assert name and backends
    namespace = f"_qdiff_kernels_{_digest()}"
    folders = []
    for backend in re.findall(r'"(\w+)"', backends[1]):
        folder = build / f"torch-{backend}"
        shutil.copytree(PACKAGE, folder, ignore=shutil.ignore_patterns("__pycache__"))
        ops = folder / "_ops.py"
        ops.write_text(ops.read_text().replace('NAMESPACE = "qdiff"', f'NAMESPACE = "{namespace}"'))
        metadata = {
            "id": namespace,
            "name": name[1],
            "version": 1,
            "license": "apache-2.0",
            "python-depends": [],
            "backend": {"type": backend},
        }
        (folder / "metadata.json").write_text(json.dumps(metadata, indent=1) + "\n")
        folders.append(folder)
    shutil.copy(SOURCE / "CARD.md", output / "README.md")
    return folders


def _digest() -> str:
    """Eight hexadecimal digits of the sources: two builds loaded side by side must not share ops."""
    digest = hashlib.sha256()
    for file in sorted(PACKAGE.rglob("*")):
        if file.is_file() and "__pycache__" not in file.parts:
            digest.update(file.relative_to(PACKAGE).as_posix().encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:8]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    for built in package(parser.parse_args().output):
        print(built)
