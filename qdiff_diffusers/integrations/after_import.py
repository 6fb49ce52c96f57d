"""Run code when a module is imported, without importing it: PEFT alone takes seconds, and most programs never need it."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

Action = Callable[[], None]


class ImportWatcher(MetaPathFinder):
    """A finder that runs actions after the modules it watches have been executed, reloading included. It finds nothing itself."""

    def __init__(self) -> None:
        self.actions: dict[str, list[Action]] = {}

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name not in self.actions:
            return None
        others = (finder for finder in list(sys.meta_path) if finder is not self and hasattr(finder, "find_spec"))
        spec = next((spec for finder in others if (spec := finder.find_spec(name, path, target)) is not None), None)
        if spec is not None and hasattr(spec.loader, "exec_module"):
            spec.loader = _ActingLoader(spec.loader, self.actions[name])
        return spec


class _ActingLoader(Loader):
    """A module's own loader, followed by the actions, which must not raise: an error would break the user's import."""

    def __init__(self, loader: Any, actions: list[Action]) -> None:
        self.loader = loader
        self.actions = actions

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__.loader = module.__loader__ = self.loader  # type: ignore[union-attr]
        self.loader.exec_module(module)
        for action in list(self.actions):
            action()

    def __getattr__(self, name: str) -> Any:
        """The other attributes of the module's own loader, such as ``get_source``."""
        if name == "loader":
            raise AttributeError(name)
        return getattr(self.loader, name)


_watcher = ImportWatcher()


def after_import(name: str, action: Action) -> None:
    """Run ``action`` whenever ``name`` has been imported, and now if it has been already. An equal action runs once per import."""
    actions = _watcher.actions.setdefault(name, [])
    if action not in actions:
        actions.append(action)
    if _watcher not in sys.meta_path:
        sys.meta_path.insert(0, _watcher)
    if sys.modules.get(name) is not None:
        importlib.import_module(name)  # returns once another thread that is importing it has finished
        action()
