"""How functions of other libraries are wrapped: each independently of the others, after the program has imported the library.

A :class:`Patch` says which function, what wraps it, and which feature needs it. If a later version of the library lacks the
function, that one feature is off and one warning says so; everything else works, and the import goes on.
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

MARKER = "of_qdiff"  # attribute of every wrapper: names of the bodies that it has been given


@dataclass(frozen=True)
class Patch:
    """One function of another library that is wrapped.

    Attributes:
        module: module that holds the function. Nothing happens until the program imports it.
        path: the function in ``module``, as ``"function"`` or ``"Class.method"``. Both parts may be patterns (``"*.from_unet"``),
            which stand for all functions that match, in the class or module that defines them.
        body: ``"module:function"`` of this package, imported at the first call. It gets the original function, then the arguments.
        feature: the feature that is off if the function cannot be wrapped.
        essential: whether qdiff cannot work with the library without it; using the two together is an error then.
        upstream: the change in the library that would make the row unnecessary.
        versions: versions of the library that need it (PEP 440), by default all.
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
        """Wrap the function; calling this again changes nothing.

        Raises:
            AttributeError: the name does not exist.
            TypeError: the name is no function.
        """
        for owner, name in _find(module, self.path):
            self._wrap(owner, name)

    def _wrap(self, owner: Any, name: str) -> None:
        wrap(owner, name, self.body, self._body)

    def _body(self) -> Callable[..., Any] | None:
        """The wrapping function; ``None``, after a warning, if importing it fails."""
        try:
            return load(self.body)
        except Exception as error:
            _switch_off(self, error)
            return None


def wrap(owner: Any, name: str, body: str, resolve: Callable[[], Callable[..., Any] | None]) -> None:
    """Wrap ``owner.name`` in the function that ``resolve`` finds at each call; the same ``body`` a second time changes nothing.

    Raises:
        TypeError: ``owner.name`` is no function.
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
    """An action on a class, or on the module if ``path`` is empty: ``body`` is called with it once it has been imported."""

    def install(self, module: ModuleType) -> None:
        load(self.body)(functools.reduce(getattr, filter(None, self.path.split(".")), module))


@dataclass(frozen=True)
class Entry(Patch):
    """An entry in a dictionary of another library: ``path`` is the dictionary, ``body`` the value."""

    key: str = ""

    def install(self, module: ModuleType) -> None:
        for owner, name in _find(module, self.path):
            getattr(owner, name)[self.key] = load(self.body)

    @property
    def target(self) -> str:
        return f"{self.module}.{self.path}[{self.key!r}]"


class State(NamedTuple):
    """State of a row of the table.

    Attributes:
        name: "active", "off", "waiting" (for the library to be imported) or "not needed" (by the installed version).
        reason: why the row is off.
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
    """State of a row of the table."""
    return _states.get(row) or State("waiting" if row.is_needed() else "not needed")


def examine(rows: Iterable[Patch]) -> dict[Patch, State]:
    """State of every row whose library is installed; the libraries' modules are imported for it."""
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
        QDiffError: an essential row of the library is off.
    """
    for row, found in _states.items():
        if row.essential and row.library == library and found.name == "off":
            raise QDiffError(
                f"qdiff does not work with {library} {installed_version(library)}, whose {row.target} is not what it was "
                f"({found.reason}); upgrade qdiff-diffusers, or install a version of {library} that it supports"
            )


def load(name: str) -> Any:
    """Import the object that ``"module:name"`` names."""
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
    """The classes or modules that hold the functions which ``path`` names, and the functions' names in them.

    Raises:
        AttributeError: nothing matches.
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
