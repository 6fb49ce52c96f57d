"""How names of other libraries are wrapped: once for all, each alone, and only after the user's program has imported them.

A :class:`Patch` says which name, what stands in its place, and what stops working without it. Where the name is gone or has changed
its kind, that one feature is off: one warning says so, everything else goes on, and so does the import that led here.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
import inspect
import sys
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from types import ModuleType
from typing import Any, NamedTuple

from diffusers.utils import logging
from packaging.specifiers import SpecifierSet

from ..errors import QDiffError
from .after_import import after_import

logger = logging.get_logger(__name__)

MARKER = "of_qdiff"  # attribute of every function that we have put in another's place: the bodies around it


@dataclass(frozen=True)
class Patch:
    """One name of another library that is wrapped.

    Attributes:
        module: that holds the name. Nothing happens before it has been imported, nor if it never is.
        path: of the name in ``module``, ``"function"`` or ``"Class.method"``. Both parts may be patterns (``"*.from_unet"``): then
            every function is meant that fits, in the class or module that defines it.
        body: ``"module:function"`` of this package, imported at the first call. It gets the original function, then the arguments.
        feature: what is off without it.
        essential: whether nothing works without it: using the library with qdiff is an error then.
        upstream: what would make the row unnecessary: a change that is proposed, or wanted, or has been made.
        versions: of the library that need it (PEP 440), all by default.
    """

    module: str
    path: str
    body: str
    feature: str
    essential: bool = False
    upstream: str = ""
    versions: str = ""

    @property
    def library(self) -> str:
        """Name of the package to import, and of its distribution."""
        return self.module.partition(".")[0]

    @property
    def target(self) -> str:
        return f"{self.module}.{self.path}".rstrip(".")

    def is_needed(self) -> bool:
        """Whether the installed version of the library is one of ``versions``."""
        installed = installed_version(self.library)
        return not self.versions or installed is None or SpecifierSet(self.versions).contains(installed, prereleases=True)

    def install(self, module: ModuleType) -> None:
        """Do it; doing it again changes nothing.

        Raises:
            AttributeError: the name does not exist.
            TypeError: it is no function.
        """
        for owner, name in _find(module, self.path):
            self._wrap(owner, name)

    def _wrap(self, owner: Any, name: str) -> None:
        wrap(owner, name, self.body, self._body)

    def _body(self) -> Callable[..., Any] | None:
        """What stands in the name's place; ``None``, after a warning, where importing it fails."""
        try:
            return load(self.body)
        except Exception as error:
            _switch_off(self, error)
            return None


def wrap(owner: Any, name: str, body: str, resolve: Callable[[], Callable[..., Any] | None]) -> None:
    """Put a function, found by ``resolve`` at each call, around ``owner.name``; the same ``body`` a second time changes nothing.

    Raises:
        TypeError: it is no function.
    """
    static = inspect.getattr_static(owner, name)
    original = static.__func__ if isinstance(static, classmethod | staticmethod) else static
    bodies = getattr(original, MARKER, ())
    if body in bodies:
        return
    if not callable(original):
        raise TypeError(f"{name} is a {type(original).__name__}, not a function")

    @functools.wraps(original)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        function = resolve()
        return original(*args, **kwargs) if function is None else function(original, *args, **kwargs)

    setattr(wrapper, MARKER, (*bodies, body))
    setattr(owner, name, type(static)(wrapper) if isinstance(static, classmethod | staticmethod) else wrapper)


@dataclass(frozen=True)
class Setup(Patch):
    """Something done to a class, or to the module itself where ``path`` is empty: ``body`` is called with it once it is there."""

    def install(self, module: ModuleType) -> None:
        load(self.body)(functools.reduce(getattr, filter(None, self.path.split(".")), module))


@dataclass(frozen=True)
class Entry(Patch):
    """A value that is put into a dictionary of another library: ``path`` is the dictionary, ``body`` the value."""

    key: str = ""

    def install(self, module: ModuleType) -> None:
        for owner, name in _find(module, self.path):
            getattr(owner, name)[self.key] = load(self.body)

    @property
    def target(self) -> str:
        return f"{self.module}.{self.path}[{self.key!r}]"


class State(NamedTuple):
    """What has become of a row.

    Attributes:
        name: "active", "off", "waiting" (for the library to be imported) or "not needed" (by the installed version).
        reason: why it is off.
    """

    name: str
    reason: str = ""


_states: dict[Patch, State] = {}
_lock = threading.Lock()


def apply(rows: Iterable[Patch]) -> None:
    """Install every row whose module has been imported, and the others once it is; calling it again changes nothing."""
    by_module: dict[str, list[Patch]] = {}
    for row in rows:
        by_module.setdefault(row.module, []).append(row)
    for module, group in by_module.items():
        after_import(module, _Installation(module, tuple(group)))


def state(row: Patch) -> State:
    """What has become of a row of the table."""
    return _states.get(row) or State("waiting" if row.is_needed() else "not needed")


def examine(rows: Iterable[Patch]) -> dict[Patch, State]:
    """What becomes of every row whose library is installed, its module imported now."""
    found = {}
    for row in rows:
        if importlib.util.find_spec(row.library) is None:
            continue
        if row.is_needed():
            try:
                importlib.import_module(row.module)
            except Exception as error:
                _switch_off(row, error)
        found[row] = state(row)
    return found


def require(library: str) -> None:
    """Make sure that ``library`` knows qdiff.

    Raises:
        QDiffError: an essential row of it is off.
    """
    for row, found in _states.items():
        if row.essential and row.library == library and found.name == "off":
            raise QDiffError(
                f"qdiff does not work with {library} {installed_version(library)}, whose {row.target} is not what it was "
                f"({found.reason}); upgrade qdiff-diffusers, or install a version of {library} that it supports"
            )


def load(name: str) -> Any:
    """The object that ``"module:name"`` means."""
    module, _, attribute = name.partition(":")
    return getattr(importlib.import_module(module), attribute)


@functools.cache
def installed_version(library: str) -> str | None:
    """Version of an installed library, ``None`` where there is none."""
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return None


@dataclass(frozen=True)
class _Installation:
    """The rows of one module, installed one by one when it has been imported."""

    module: str
    rows: tuple[Patch, ...]

    def __call__(self) -> None:
        for row in filter(Patch.is_needed, self.rows):
            try:
                row.install(sys.modules[self.module])
            except Exception as error:
                _switch_off(row, error)
            else:
                _states.setdefault(row, State("active"))


def _switch_off(row: Patch, error: Exception) -> None:
    """Remember that a row does not work, and say so once."""
    with _lock:
        told = _states.get(row, State("")).name == "off"
        _states[row] = State("off", str(error) or type(error).__name__)
    if not told:
        logger.warning(
            f"qdiff: {row.feature} is off, because {row.target} of {row.library} {installed_version(row.library)} is not what it "
            f"was ({type(error).__name__}: {error}); everything else works. Upgrading qdiff-diffusers may help"
        )


def _find(module: ModuleType, path: str) -> list[tuple[Any, str]]:
    """The classes or modules that hold what ``path`` means, and its name there.

    Raises:
        AttributeError: nothing fits.
    """
    first, _, last = path.rpartition(".")
    owners = [value for name, value in vars(module).items() if fnmatchcase(name, first)] if first else [module]
    owners = [owner for owner in owners if isinstance(owner, type | ModuleType)]
    if "*" in last or "*" in first:
        found = [(owner, name) for owner in owners for name in vars(owner) if fnmatchcase(name, last)]
    else:
        found = [(owner, last) for owner in owners if hasattr(owner, last)]
    if not found:
        raise AttributeError(f"there is no {path}")
    return found
