"""``qdiff push``"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .console import stdout


def push(
    folder: Annotated[Path, typer.Argument(help="Folder of a quantized model or pipeline.")],
    name: Annotated[str, typer.Argument(help="Where to: owner/name, or name for one of your own.")],
    private: Annotated[bool | None, typer.Option("--private/--public", help="Of a new repository.")] = None,
    revision: Annotated[str | None, typer.Option(help="Branch to commit to; made if needed.")] = None,
    message: Annotated[str | None, typer.Option("-m", "--message", help="Of the commit.")] = None,
    evaluation: Annotated[
        Path | None, typer.Option("--eval", help="Output folder of qdiff eval; its scores and pictures go into the card.")
    ] = None,
) -> None:
    """Upload a quantized model to the Hugging Face Hub, with a model card. After a failure, run it again."""
    from ..hub import push_folder

    commit = push_folder(folder, name, private=private, revision=revision, message=message, evaluation=evaluation)
    console = stdout()
    console.print(commit.commit_url, soft_wrap=True)
    console.print(f'load this very state with revision="{commit.oid}"', soft_wrap=True)
