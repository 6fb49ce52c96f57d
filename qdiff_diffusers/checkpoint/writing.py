"""Files that are never half-written, explanations of the system's errors, and an orderly end on signals."""

from __future__ import annotations

import errno
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

from safetensors import SafetensorError

from ..errors import OutputError

MAX_NAME = 300  # characters of a path in a message
ENDING = ("SIGTERM", "SIGHUP")
# What to do about the system's reasons for not writing.
WAYS_OUT = {
    errno.ENOSPC: "free some space, or choose another disk",
    errno.EDQUOT: "free some space, or choose another disk",
    errno.EROFS: "choose a folder that can be written",
    errno.EACCES: "choose a folder that you may write to",
    errno.EPERM: "choose a folder that you may write to",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ELOOP: "remove the links that lead to each other",
}
# Messages of safetensors, which has errors of its own, and torch for a file that could not be written.
UNWRITTEN = ("No space left", "Disk quota", "Read-only file system", "os error 28", "PytorchStreamWriter", "unexpected pos")


class EndedError(SystemExit):
    """A signal asks the program to end; its exit code is what shells give to such programs."""

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self.signal = signal.Signals(number)


@contextmanager
def written_file(path: Path) -> Iterator[Path]:
    """A temporary path to write to, whose file replaces ``path`` if the block ends without an error, and is removed otherwise.

    Raises:
        OutputError: the file could not be written.
    """
    part = path.with_name(path.name + ".part")
    try:
        with writing(path, part, path.parent):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield part
            part.replace(path)
    finally:
        with suppress(OSError):
            part.unlink()


def write_text(path: Path, text: str) -> None:
    """Write a text file that is never half-written; see :func:`written_file`."""
    with written_file(path) as part:
        part.write_text(text, encoding="utf-8")


@contextmanager
def writing(shown: Path, *paths: Path) -> Iterator[None]:
    """Turn errors when writing ``paths`` into an :class:`OutputError` about ``shown``; other errors pass."""
    try:
        yield
    except OSError as error:
        concerned = [os.path.abspath(name) for name in (error.filename, error.filename2) if isinstance(name, str)]
        related = [(Path(name), Path(os.path.abspath(path))) for name in concerned for path in paths]
        inside = any(name.is_relative_to(path) or path.is_relative_to(name) for name, path in related)
        if not inside and error.errno not in (errno.ENOSPC, errno.EDQUOT) and not _is_unwritten(error):
            raise
        raise OutputError(explained(shown, error)) from error
    except (SafetensorError, RuntimeError) as error:
        if not _is_unwritten(error):
            raise
        raise OutputError(f"cannot write to {shown}: {error}; {WAYS_OUT[errno.ENOSPC]}") from error


def _is_unwritten(error: Exception) -> bool:
    return any(words in str(error) for words in UNWRITTEN)


def explained(shown: Path, error: OSError) -> str:
    """The system's reason, and what to do."""
    name, reason = str(shown), error.strerror or str(error)
    name = name if len(name) <= MAX_NAME else f"{name[:MAX_NAME]} ..."
    return f"cannot write to {name}: {reason}; {WAYS_OUT.get(error.errno or 0, 'choose another folder')}"


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """A context in which SIGTERM and SIGHUP raise an exception, so that the program cleans up. Its own handlers stay."""
    replaced = []
    if threading.current_thread() is threading.main_thread():
        numbers = [getattr(signal, name) for name in ENDING if hasattr(signal, name)]
        replaced = [number for number in numbers if signal.getsignal(number) is signal.SIG_DFL]
    for number in replaced:
        signal.signal(number, _end)
    try:
        yield
    finally:
        for number in replaced:
            signal.signal(number, signal.SIG_DFL)


def _end(number: int, frame: FrameType | None) -> None:
    raise EndedError(number)
