"""All commands put together. A mistake of the user costs one line on stderr and exit code 2."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from .. import __version__
from ..checkpoint.writing import EndedError, ended_by_signals
from .bench import bench
from .comfy import comfy
from .console import errors, print_error
from .convert import convert
from .demo import demo
from .doctor import doctor
from .eval import evaluate
from .inspect import inspect
from .push import push
from .quantize import quantize

USER_ERROR = 2
INTERRUPTED = 130

app = typer.Typer(
    name="qdiff",
    help="Diffusion models at 2 to 8 bits.",
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
)
for command in (demo, quantize, inspect, push, doctor):
    app.command()(command)
app.command("eval")(evaluate)
app.add_typer(bench, name="bench")
app.add_typer(convert, name="convert")
app.add_typer(comfy, name="comfy")


@app.callback(invoke_without_command=True)
def root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    """Diffusion models at 2 to 8 bits."""
    if version:
        typer.echo(f"qdiff {__version__}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())
        raise typer.Exit


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit: 0 when all went well, 2 for an error that the user can mend, 1 for any other."""
    sys.exit(_run(arguments))


def _run(arguments: Sequence[str] | None) -> int:
    try:
        with ended_by_signals():
            code = app(args=None if arguments is None else list(arguments), standalone_mode=False) or 0
        if code == INTERRUPTED:  # typer has caught the interrupt
            print_error("interrupted")
        return code
    except EndedError as end:
        print_error(f"ended by {end.signal.name}")
        return 128 + end.signal
    except (KeyboardInterrupt, typer.Abort):
        print_error("interrupted")
        return INTERRUPTED
    except Exception as error:
        if hasattr(error, "format_message"):  # usage errors of typer and click share no public base class
            print_error(error.format_message())
            return USER_ERROR
        if isinstance(error, errors()):
            print_error(str(error))
            return USER_ERROR
        raise
