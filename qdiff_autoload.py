"""Lets ``from_pretrained`` load quantized checkpoints with nothing of ours imported.

torch calls :func:`autoload` at the end of ``import torch`` (the entry point group ``torch.backends``). It waits until diffusers
or transformers import their tables of quantization methods and puts stand-ins for ``qdiff`` there, which import the package
once a checkpoint needs it. ``QDIFF_AUTOLOAD=0`` switches it off, and so does torch's ``TORCH_DEVICE_BACKEND_AUTOLOAD=0``.

An exception here would break ``import torch`` itself. So this module stands alone, imports next to nothing, and gives up
quietly: what does not work then is only loading without ``import qdiff_diffusers``.
"""

from __future__ import annotations

import contextlib
import os
import sys

TYPE_CHECKING = False  # typing's own costs an import
if TYPE_CHECKING:
    from typing import Any

METHOD = "qdiff"
TABLES = ("AUTO_QUANTIZATION_CONFIG_MAPPING", "AUTO_QUANTIZER_MAPPING")
TARGETS = ("diffusers.quantizers.auto", "transformers.quantizers.auto")
OFF = ("0", "false", "no", "off")


def autoload() -> None:
    """Entry point of torch. Never raises."""
    with contextlib.suppress(Exception):
        if is_on():
            _install()


def is_on() -> bool:
    """Unless ``QDIFF_AUTOLOAD`` says otherwise."""
    return os.environ.get("QDIFF_AUTOLOAD", "1").strip().lower() not in OFF


def _install() -> None:
    waiting: set[str] = set()
    for target in TARGETS:
        if target in sys.modules:
            _register(sys.modules[target])
        else:
            waiting.add(target)
    if waiting and not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder(waiting))  # type: ignore[arg-type]


class _Finder:
    """Finds nothing itself: it wraps the loader of the modules that hold the tables, and leaves when all have been imported."""

    def __init__(self, waiting: set[str]) -> None:
        self.waiting = waiting

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name not in self.waiting:
            return None
        with contextlib.suppress(Exception):
            for finder in list(sys.meta_path):
                find_spec = getattr(finder, "find_spec", None)
                spec = None if finder is self or find_spec is None else find_spec(name, path, target)
                if spec is not None:
                    if hasattr(spec.loader, "exec_module"):
                        spec.loader = _Loader(spec.loader, self)
                    return spec
        return None

    def seen(self, name: str) -> None:
        """A module has been imported. Looking for one (``importlib.util.find_spec``) does not count."""
        self.waiting.discard(name)
        if not self.waiting and self in sys.meta_path:  # type: ignore[comparison-overlap]
            sys.meta_path.remove(self)  # type: ignore[arg-type]


class _Loader:
    """A module's own loader, followed by the registration."""

    def __init__(self, original: Any, finder: _Finder) -> None:
        self.original = original
        self.finder = finder

    def create_module(self, spec: Any) -> Any:
        return self.original.create_module(spec)

    def exec_module(self, module: Any) -> None:
        module.__loader__ = module.__spec__.loader = self.original
        self.original.exec_module(module)
        with contextlib.suppress(Exception):
            _register(module)
        with contextlib.suppress(Exception):
            self.finder.seen(module.__name__)

    def __getattr__(self, name: str) -> Any:
        if name == "original":  # of a copy that is being made
            raise AttributeError(name)
        return getattr(self.original, name)


def _register(module: Any) -> None:
    """Put stand-ins into both tables of a module, unless something is there already."""
    for table in TABLES:
        entries = getattr(module, table)
        if METHOD not in entries:
            entries[METHOD] = _StandIn("QDiff", (), {"module": module.__name__, "table": table})


class _StandIn(type):
    """A class that becomes the real one, in the table it stands in, the first time it is used."""

    def __getattribute__(cls, name: str) -> Any:
        if name in ("from_dict", "__init__"):  # what the loaders use of an entry, besides calling it
            return getattr(_resolve(cls), name)
        return super().__getattribute__(name)

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        return _resolve(cls)(*args, **kwargs)


def _resolve(stand_in: Any) -> Any:
    try:
        import qdiff_diffusers  # noqa: F401  (it replaces the stand-ins)
    except Exception as error:
        raise ImportError(
            f"this model is quantized with qdiff, but qdiff_diffusers cannot be imported ({type(error).__name__}: {error}); "
            "reinstall it with `pip install --force-reinstall qdiff-diffusers`"
        ) from error
    real = getattr(sys.modules[stand_in.module], stand_in.table)[METHOD]
    if isinstance(real, _StandIn):
        library = stand_in.module.partition(".")[0]
        raise ImportError(f"qdiff does not work with the installed {library}; please upgrade it")
    return real
