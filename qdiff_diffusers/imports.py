"""Act on a module when somebody imports it, without importing it first: PEFT alone takes seconds, and most never need it."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

Action = Callable[[], None]


class ImportWatcher(MetaPathFinder):
    """Lets every import through, and runs an action after those that it watches."""

    def __init__(self) -> None:
        self.actions: dict[str, Action] = {}

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> ModuleSpec | None:
        action = self.actions.pop(name, None)
        if action is None:
            return None
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            spec.loader = _ActingLoader(spec.loader, action)
        return spec


class _ActingLoader(Loader):
    def __init__(self, loader: Any, action: Action) -> None:
        self.loader = loader
        self.action = action

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__.loader = module.__loader__ = self.loader  # type: ignore[union-attr]
        self.loader.exec_module(module)
        self.action()


_watcher = ImportWatcher()


def after_import(name: str, action: Action) -> None:
    """Run ``action`` once ``name`` has been imported: now, if it has been already."""
    if name in sys.modules:
        action()
        return
    _watcher.actions[name] = action
    if _watcher not in sys.meta_path:
        sys.meta_path.insert(0, _watcher)
