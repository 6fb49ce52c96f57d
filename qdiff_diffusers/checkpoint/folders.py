"""Folders for results: checked before the work begins, written in a hidden folder, moved into place once complete.

A new folder is written beside its place and renamed. One that exists already (a mount point, the current folder, the target of a
link) stays what it is: its new content is written in a hidden folder inside it and moved up. That hidden folder holds a lock, so
that two runs never write to the same place, and what a killed run has left is known by nobody holding it.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from diffusers.utils import logging
from filelock import FileLock, Timeout

from ..errors import ConfigError
from .writing import ended_by_signals, explained, writing

logger = logging.get_logger(__name__)
INDEX, CONFIG = "model_index.json", "config.json"
STAGE = ".qdiff-writing"  # suffix of every hidden folder, which holds the following
LOCK, NEW, OLD, MOVING = "lock", "new", "old", "moving.json"
WORKSPACE = "-calibration"
OF_THE_SYSTEM = ("lost+found",)  # what a fresh volume holds
PROBE_BYTES = 1 << 20
PROBE = "diffusion_pytorch_model-00001-of-00001.safetensors"  # as long as names of files get
NAME_MAX = 255


def is_saved_model(folder: Path) -> bool:
    """Whether a folder holds a model or pipeline as diffusers saves them."""
    try:
        file = folder / INDEX if (folder / INDEX).is_file() else folder / CONFIG
        return "_class_name" in json.loads(file.read_text())
    except (OSError, ValueError):
        return False


class Output:
    """A folder that this process alone may fill.

    Attributes:
        folder: the folder as the caller named it.
        workspace: a folder for unfinished work that another run resumes: beside ``folder``, or inside it if it exists already.
    """

    def __init__(self, folder: Path, place: Path, stage: Path, check: Callable[[], None]) -> None:
        self.folder, self.place, self.stage, self._check = folder, place, stage, check
        self.workspace = place / f".qdiff{WORKSPACE}" if place.exists() else _hidden(place, WORKSPACE)

    @contextmanager
    def written(self) -> Iterator[Path]:
        """A temporary folder to write to. Its content moves into place if the block ends without an error, else it is removed.

        Raises:
            OutputError: it could not be written, for want of space for instance. The former content is still there.
        """
        new = self.stage / NEW
        with writing(self.folder, self.stage, self.place):
            new.mkdir()
            yield new
            if self.place.exists():
                self._move_in(new)
            else:
                new.rename(self.place)

    def _move_in(self, new: Path) -> None:
        self._check()  # again: something may have come there meanwhile
        names = sorted(os.listdir(new), key=lambda name: name in (INDEX, CONFIG))  # what makes it a model comes last
        replaced = {*content(self.place), *set(names).intersection(os.listdir(self.place))}
        (self.stage / OLD).mkdir()
        (self.stage / MOVING).write_text(json.dumps(names))
        try:
            for name in replaced:
                (self.place / name).rename(self.stage / OLD / name)
            for name in names:
                (new / name).rename(self.place / name)
        except BaseException:
            _move_back(self.stage, self.place)
            raise
        (self.stage / MOVING).unlink()


def check_output(folder: Path, overwrite: bool, *sources: Any) -> None:
    """Check early, before there is anything to write, that :func:`reserved` will accept ``folder``."""
    with reserved(folder, overwrite, *sources):
        pass


@contextmanager
def written_at_once(folder: Path, overwrite: bool = False, *sources: Any, **more: Any) -> Iterator[Path]:
    """:func:`reserved` and :meth:`Output.written` in one, for work that does nothing but write."""
    with reserved(folder, overwrite, *sources, **more) as output, output.written() as new:
        yield new


@contextmanager
def reserved(
    folder: Path,
    overwrite: bool = False,
    *sources: Any,
    nbytes: int = 0,
    replaceable: Callable[[Path], bool] = is_saved_model,
) -> Iterator[Output]:
    """Reserve an output folder for this process while it produces the content.

    Args:
        folder: a new folder or an empty one; it may hold a saved model if ``overwrite``. Hidden files do not count, and stay.
        sources: paths that the model is made from; objects other than paths are passed over.
        nbytes: number of bytes that the result needs at least.
        replaceable: tells whether a folder's content may be overwritten.

    Raises:
        ConfigError: the folder holds something that must not be replaced, another run is writing there, or it cannot be written.
    """
    place = real_place(folder)

    def check() -> None:
        _check_content(folder, place, overwrite, replaceable)

    _check_apart(folder, place, sources)
    if not (place / STAGE).exists():  # of a run that may have been killed while it moved files in
        check()
    with _staged(folder, place, place.exists(), nbytes) as stage:
        check()
        yield Output(folder, place, stage, check)


@contextmanager
def held(folder: Path, *sources: Any, name: str = "") -> Iterator[None]:
    """Reserve a folder for this process that may hold other files, and whose own files are written one by one.

    Args:
        folder: the folder, made if there is none, and removed again if nothing was written.
        sources: paths that the files are made from, as for :func:`reserved`.
        name: name of what is written; runs with different names may write at the same time.

    Raises:
        ConfigError: another run is writing there, or the folder cannot be written.
    """
    place = real_place(folder)
    _check_apart(folder, place, sources)
    with _staged(folder, place / name, not name):
        yield


def check_writable(folder: Path) -> None:
    """Make sure that files can be written in a folder, existing or new, which other processes may use at the same time.

    Raises:
        ConfigError: no file can be written there.
    """
    place = real_place(folder)
    with _refusing(folder), ExitStack() as stack:
        stack.callback(_remove_empty, _make_folders(place))
        _probe(folder, Path(stack.enter_context(TemporaryDirectory(dir=place, prefix=f"{STAGE}-"))))


def real_place(folder: Path) -> Path:
    """The path of a folder with all links resolved.

    Raises:
        ConfigError: the path is a file, a link to nowhere, or cannot be a folder's name.
    """
    if "\0" in str(folder):
        raise ConfigError(f"{str(folder)!r} cannot be a folder's name: it has a zero byte")
    with _refusing(folder):
        named = Path(os.path.abspath(folder))
        if os.path.islink(named) and not named.exists():
            raise ConfigError(f"{folder} is a link to {os.readlink(named)}, where there is nothing; make that or remove the link")
        place = Path(os.path.realpath(named))
        with suppress(FileNotFoundError):
            place.lstat()  # complains of names that are too long, for instance
            if not place.is_dir():
                raise ConfigError(f"{folder} is no folder but a file; choose another name, or move it away")
    return place


@contextmanager
def _refusing(folder: Path) -> Iterator[None]:
    """Turn the system's errors when writing to ``folder`` into a :class:`ConfigError`."""
    try:
        yield
    except OSError as error:
        raise ConfigError(explained(folder, error)) from error


def _check_content(folder: Path, place: Path, overwrite: bool, replaceable: Callable[[Path], bool]) -> None:
    """Check a folder's content against ``overwrite`` and ``replaceable`` of :func:`reserved`."""
    with _refusing(folder):
        found = content(place)
    if not found:
        return
    if not overwrite:
        raise ConfigError(f"{folder} is not empty; choose another folder, or overwrite it")
    if not replaceable(place):
        raise ConfigError(f"{folder} holds no saved model, so it is not overwritten; choose another folder")
    if mounted := [name for name in found if os.path.ismount(place / name)]:
        raise ConfigError(f"{folder / mounted[0]} is a mount point, which cannot be replaced; choose another folder")


def _check_apart(folder: Path, place: Path, sources: Iterable[Any]) -> None:
    """Refuse to write a model over, or into, what it is made from."""
    for source in sources:
        if not isinstance(source, str | Path) or not os.path.exists(source):
            continue
        origin = Path(os.path.realpath(source))
        if place == origin:
            raise ConfigError(f"{folder} is the source itself, which is not overwritten; choose another folder")
        if place in origin.parents and _holds_model(place):
            raise ConfigError(f"the source {source} lies inside {folder}, which would be replaced; choose another folder")
        if origin in place.parents and _holds_model(origin):
            raise ConfigError(f"{folder} lies inside the source {source}, which would become part of it; choose another folder")


def _holds_model(folder: Path) -> bool:
    return (folder / INDEX).is_file() or (folder / CONFIG).is_file()


def content(folder: Path) -> list[str]:
    """Names in a folder, except hidden files and those of the file system; empty if there is no folder."""
    names = os.listdir(folder) if folder.exists() else []
    return [name for name in names if not name.startswith(".") and name not in OF_THE_SYSTEM]


def clear(folder: Path) -> None:
    """Remove the :func:`content` of a folder."""
    for name in content(folder):
        _remove(folder / name)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _hidden(place: Path, suffix: str) -> Path:
    """A hidden name beside ``place``, shortened to the length that file systems allow."""
    name = f".{place.name}{suffix}"
    if len(os.fsencode(name)) > NAME_MAX:
        name = f".{hashlib.sha256(os.fsencode(place.name)).hexdigest()[:16]}{suffix}"
    return place.parent / name


@contextmanager
def _staged(shown: Path, place: Path, inside: bool, nbytes: int = 0) -> Iterator[Path]:
    """A hidden folder of this process, inside ``place`` or beside it; it is removed afterwards.

    Raises:
        ConfigError: another process uses it, or it cannot be written.
    """
    stage = place / STAGE if inside else _hidden(place, STAGE)
    with ExitStack() as stack:
        stack.enter_context(ended_by_signals())
        with _refusing(shown):
            stack.callback(_remove_empty, _make_folders(stage.parent))
            stack.enter_context(_locked(shown, place, stage))
            if inside and (beside := _hidden(place, STAGE)).is_dir():  # of a run that was killed before the folder was there
                stack.enter_context(_locked(shown, place, beside))
            _probe(shown, stage, nbytes)
        yield stage


def _make_folders(folder: Path) -> list[Path]:
    """Make a folder and its parents. Returns those that were not there, the innermost first."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        _remove_empty(missing)
        raise
    return missing


def _remove_empty(folders: Iterable[Path]) -> None:
    for folder in folders:
        with suppress(OSError):
            folder.rmdir()


@contextmanager
def _locked(shown: Path, place: Path, stage: Path) -> Iterator[None]:
    """Lock the hidden folder ``stage``, made if there is none; what a killed run has left in it is removed."""
    lock = _lock(shown, stage)
    try:
        left = [name for name in os.listdir(stage) if name != LOCK]
        if left:
            _move_back(stage, place)
            _clear_stage(stage)
            logger.warning("Removed %s, which a run that was ended has left", stage)
        yield
    finally:
        _clear_stage(stage)
        with suppress(OSError):
            (stage / LOCK).unlink()  # before it is released: nobody may take it and have it removed
        lock.release()
        with suppress(OSError):  # another process is there already
            if os.name == "nt":  # where a file that is open stays
                (stage / LOCK).unlink(missing_ok=True)
            stage.rmdir()


def _lock(shown: Path, stage: Path) -> FileLock:
    while True:
        stage.mkdir(exist_ok=True)
        lock = FileLock(stage / LOCK, timeout=0)
        try:
            lock.acquire()
        except FileNotFoundError:  # its last owner has just removed the stage
            continue
        except Timeout as error:
            raise ConfigError(f"another process is writing to {shown}; wait until it is done, or choose another folder") from error
        except NotImplementedError:
            logger.warning("The file system of %s has no file locks: let no other process write there", shown)
            return lock
        if (stage / LOCK).exists():
            return lock
        lock.release()


def _probe(shown: Path, stage: Path, nbytes: int = 0) -> None:
    """Try whether files can be written, and whether there is space for ``nbytes``."""
    path = stage / NEW / PROBE
    path.parent.mkdir()
    path.write_bytes(bytes(PROBE_BYTES))
    path.unlink()
    path.parent.rmdir()
    usage = shutil.disk_usage(stage)
    if usage.total and usage.free < nbytes:
        raise ConfigError(
            f"cannot write to {shown}: it takes {nbytes / 1e9:.2f} GB, and {usage.free / 1e9:.2f} GB are free; free some space, or "
            "choose another disk"
        )


def _clear_stage(stage: Path) -> None:
    """Remove everything in a hidden folder but its lock."""
    for path in stage.iterdir() if stage.is_dir() else ():
        if path.name != LOCK:
            _remove(path)


def _move_back(stage: Path, place: Path) -> None:
    """Undo a move into ``place`` that was not completed."""
    if not (stage / MOVING).is_file():
        return
    with suppress(ValueError):  # cut off before anything was moved
        for name in json.loads((stage / MOVING).read_text()):
            if not os.path.lexists(stage / NEW / name) and os.path.lexists(place / name):
                (place / name).rename(stage / NEW / name)
        for path in (stage / OLD).iterdir():
            path.rename(place / path.name)
