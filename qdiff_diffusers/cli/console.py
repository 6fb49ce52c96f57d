"""Output of the commands, and the exceptions that report a mistake of the user."""

from __future__ import annotations

import sys

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from ..errors import QDiffError

PIPE_WIDTH = 160  # columns where there is no terminal to ask


def stdout() -> Console:
    """Standard output; where it is no terminal, lines are wide enough not to be broken at 80 columns."""
    return Console(width=None if sys.stdout.isatty() else PIPE_WIDTH)


def print_error(message: str) -> None:
    """Print one line on standard error."""
    print(f"qdiff: {' '.join(message.split())}", file=sys.stderr)


def progress_bars() -> Progress:
    """Progress bars on standard error, removed when done; none where standard error is no terminal."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description:<36}"), BarColumn(), TextColumn("{task.percentage:>3.0f} %"), TimeElapsedColumn())
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


def errors() -> tuple[type[Exception], ...]:
    """Exceptions that report a mistake of the user rather than a defect of the program."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    return (QDiffError, OSError, HfHubHTTPError, HFValidationError)
