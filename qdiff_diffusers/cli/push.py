"""``qdiff push``"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .console import stdout


def push(
    folder: Annotated[Path, typer.Argument(help="Folder of a quantized model or pipeline.")],
    name: Annotated[str, typer.Argument(help="Repository to upload to: owner/name, or only name for one of your own.")],
    private: Annotated[
        bool | None,
        typer.Option("--private/--public", help="Make a new repository private or public; by default as the Hub decides."),
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch to commit to; it is created if needed.")] = None,
    message: Annotated[str | None, typer.Option("-m", "--message", help="Message of the commit.")] = None,
    evaluation: Annotated[
        Path | None, typer.Option("--eval", help="Output folder of qdiff eval, whose scores and pictures go into the model card.")
    ] = None,
) -> None:
    """Upload a quantized model to the Hugging Face Hub, with a model card. After a failure, run it again."""
    from ..hub import push_folder

    commit = push_folder(folder, name, private=private, revision=revision, message=message, evaluation=evaluation)
    console = stdout()
    console.print(commit.commit_url, soft_wrap=True)
    console.print(f'load exactly this state with revision="{commit.oid}"', soft_wrap=True)
