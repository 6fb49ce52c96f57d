"""``qdiff comfy install``"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Annotated

import typer

from .. import __version__
from ..checkpoint.comfy_pack import PARTS, SOURCES, find_pack
from ..checkpoint.folders import written_at_once
from ..errors import ConfigError
from .console import stdout

NAME = "qdiff"
PACK = "qdiff_pack.json"  # marks a folder that this command has written
SHIM = '''"""The qdiff nodes, put here by ``qdiff comfy install``."""

from .comfy_nodes import comfy_entrypoint as comfy_entrypoint

WEB_DIRECTORY = "./comfy_nodes/web"
'''

comfy = typer.Typer(name="comfy", help="Install the ComfyUI node pack.", no_args_is_help=True)


@comfy.callback()
def group() -> None:
    """Install the ComfyUI node pack."""


@comfy.command()
def install(
    path: Annotated[Path, typer.Argument(help="Folder of ComfyUI (the one with main.py), or its custom_nodes folder.")],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a node pack that is installed already.")] = False,
) -> None:
    """Install the nodes in a ComfyUI. They use the qdiff package of ComfyUI's own Python, so install it there too."""
    target = install_pack(path, overwrite)
    stdout().print(f"{target}: installed. Start ComfyUI again; the nodes are under qdiff.")


def install_pack(path: Path, overwrite: bool = False) -> Path:
    """Copy the node pack into ``custom_nodes/qdiff`` of a ComfyUI, where it appears only once it is complete.

    Raises:
        ConfigError: ``path`` is no ComfyUI, ``custom_nodes/qdiff`` exists already, or this installation lacks the pack's files.
    """
    folder = _custom_nodes(path)
    source = find_pack(SOURCES)
    target = folder / NAME
    if target.exists() or target.is_symlink():
        if not (target / PACK).is_file():
            raise ConfigError(f"{target} exists and was not installed by this command; move it away first")
        if not overwrite:
            raise ConfigError(f"{target} is installed already; replace it with --overwrite")
    with written_at_once(target, overwrite, replaceable=lambda found: (found / PACK).is_file()) as new:
        for part in PARTS:
            shutil.copytree(source / part, new / part, ignore=shutil.ignore_patterns("__pycache__"))
        (new / "__init__.py").write_text(SHIM)
        (new / PACK).write_text(json.dumps({"version": __version__}) + "\n")
    return target


def _custom_nodes(path: Path) -> Path:
    if not path.is_dir():
        raise ConfigError(f"{path} is not a folder; give the one that ComfyUI's main.py is in")
    folder = path if path.name == "custom_nodes" else path / "custom_nodes"
    if not folder.is_dir():
        raise ConfigError(f"{path} has no custom_nodes folder; give ComfyUI's folder, or the one of its --base-directory")
    return folder
