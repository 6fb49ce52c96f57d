"""Digests of everything that decides a result: weights, settings, functions. They are equal in all processes, or refused."""

from __future__ import annotations

import dis
import enum
import functools
import hashlib
import importlib
import importlib.util
import json
import logging
import re
import sys
import types
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import fields, is_dataclass
from importlib.metadata import PackageNotFoundError, packages_distributions, version
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import torch
from diffusers.configuration_utils import ConfigMixin
from PIL import Image
from torch import Tensor, nn

from ..errors import ConfigError
from .settings import Calibration

LENGTH = 16  # hexadecimal digits
CHUNK = 1 << 24  # bytes of a file to read at a time
PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.dtype)
NAMED_BY_REPR = (PurePath, range, torch.device, torch.layout, torch.memory_format)
# Where something was loaded from, by whom and when; none of this changes what it computes.
INCIDENTAL = ("name_or_path", "transformers_version", "dtype", "torch_dtype", "vocab_file", "merges_file", "tokenizer_file")
ADAPTERS = ("_active_adapter", "_disable_adapters")  # PEFT's attributes that say which of a layer's adapters are on
PACKAGES = ("qdiff-diffusers", "torch", "diffusers", "transformers", "tokenizers", "peft", "numpy")
CODE = (
    "co_argcount",
    "co_posonlyargcount",
    "co_kwonlyargcount",
    "co_flags",
    "co_code",
    "co_names",
    "co_varnames",
    "co_freevars",
    "co_cellvars",
    "co_consts",
    "co_exceptiontable",
)
INSTALLED = {"site-packages", "dist-packages"}  # folders
OWN = ("qdiff_diffusers", "qdiff_kernels")
BARE = ("builtins", "abc", "typing")  # modules of base classes that hold nothing, or are asked for before
BUILTIN = (types.BuiltinFunctionType, types.MethodDescriptorType, types.WrapperDescriptorType, np.ufunc)
OF_EVERY_CLASS = ("__module__", "__qualname__", "__doc__", "__dict__", "__weakref__", "__firstlineno__", "__static_attributes__")


class NoDigestError(ConfigError):
    """A value is of a kind whose content cannot be compared."""


def digest(value: Any, name: str = "the value") -> str:
    """A short hash of a value by its content.

    Args:
        value: plain values, containers, tensors, arrays, images, models, schedulers, tokenizers; functions by their code and by all
            values that they refer to.
        name: name of the value in errors.

    Raises:
        NoDigestError: the value, or one that it refers to, is of a kind whose content cannot be compared.
    """
    return _Digests().of(value, name)[:LENGTH]


def file_digest(path: Path) -> str:
    """A short hash of a file's content."""
    found = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            found.update(chunk)
    return found.hexdigest()[:LENGTH]


def folder_digest(root: Path, entries: Iterable[str] = ("",)) -> str:
    """A short hash of all files in a folder, or in some of its entries, by name and content; hidden files are left out."""
    found = {}
    for entry in entries:
        for path in [root / entry, *(root / entry).rglob("*")]:
            name = path.relative_to(root)
            if path.is_file() and not any(part.startswith(".") for part in name.parts):
                found[name.as_posix()] = file_digest(path)
    return digest(found)


def package_versions() -> dict[str, str]:
    """Versions of the packages that decide what a pipeline computes, and Python's."""
    return {"python": _python_version()} | {name: found for name in PACKAGES if (found := _version(name))}


def input_facts(pipe: Any, models: Mapping[str, nn.Module], calibration: Calibration) -> dict[str, Any]:
    """Everything that decides the inputs of the calibrated models, by name: digests, versions and numbers, JSON-able.

    Args:
        pipe: the pipeline, or the bare model.
        models: the models to calibrate, by component name.
        calibration: settings of the calibration.

    Raises:
        NoDigestError: names a part, or a value that ``run`` refers to, whose content cannot be compared.
    """
    digests = _Digests()
    parts = pipeline_parts(pipe) if hasattr(pipe, "components") else {}
    found = {name or "the model": part for name, part in {**parts, **models}.items()}
    found |= {"prompts": None if calibration.prompts is None else list(calibration.prompts)}
    found |= {"scheduler of the calibration": calibration.scheduler, "run": calibration.run_key or calibration.run}
    facts: dict[str, Any] = {name: digests.of(part, name)[:LENGTH] for name, part in found.items()}
    kinds = {next(model.parameters()).device.type for model in models.values()}
    autocast = sorted(str(torch.get_autocast_dtype(kind)) for kind in kinds if torch.is_autocast_enabled(kind))
    facts |= {"device": sorted(kinds), "autocast": autocast, "float32 precision": torch.get_float32_matmul_precision()}
    return facts | {"versions": package_versions()}


class _Digests:
    """Digests of values, each the hash of its kind and its parts' digests."""

    def __init__(self) -> None:
        self.known: dict[int, tuple[str, Any]] = {}  # holds the value too, so that no other gets its id
        self.open: list[int] = []  # ids of the values that contain the current one

    def of(self, value: Any, name: str) -> str:
        """The digest of ``value``; errors call it ``name``."""
        if isinstance(value, PLAIN) and type(value).__module__ in ("builtins", "torch"):
            return _hash([type(value).__name__, repr(value)])
        if id(value) in self.open:
            return f"the value {self.open.index(id(value))} levels down"
        if id(value) not in self.known:
            self.open.append(id(value))
            self.known[id(value)] = _hash(self._parts(value, name)), value
            self.open.pop()
        return self.known[id(value)][0]

    def _parts(self, value: Any, name: str) -> Iterator[Any]:
        if isinstance(value, Mapping | list | tuple | set | frozenset) and not _is_installed(type(value).__module__):
            return self._own_container(value, name)
        if isinstance(value, Mapping):
            return self._unordered("dict", [(key, item) for key, item in value.items()], name)
        if isinstance(value, set | frozenset):
            return self._unordered("set", value, name)
        if isinstance(value, list | tuple | deque):
            return iter(["list", *(self.of(item, name) for item in value)])
        if isinstance(value, Tensor):
            return self._tensor(value, name)
        if isinstance(value, nn.Module):
            return self._model(value, name)
        if isinstance(value, types.CodeType):
            return iter(["code", *(self.of(getattr(value, field, b""), name) for field in CODE)])
        if isinstance(value, types.ModuleType):
            return self._module(value, name)
        if isinstance(value, type):
            return self._class(value, name)
        if callable(value) and not hasattr(value, "components"):
            return self._callable(value, name)
        return self._object(value, name)

    def _own_container(self, value: Any, name: str) -> Iterator[Any]:
        """Parts of a container of a user's own class: its methods' code, its attributes and its items."""
        yield from ("container", self.of(type(value), name), self.of(_attributes(value), name))
        if isinstance(value, set | frozenset):
            yield from self._unordered("set", value, name)
        else:
            yield self.of(dict(value) if isinstance(value, Mapping) else list(value), name)

    def _unordered(self, kind: str, items: Iterable[Any], name: str) -> Iterator[Any]:
        """Items without regard to their order, which sets of strings change from process to process."""
        yield kind
        yield from sorted(self.of(item, name) for item in items)

    def _tensor(self, tensor: Tensor, name: str) -> Iterator[Any]:
        if tensor.is_meta:
            raise NoDigestError(f"{name} is on the meta device: its content is not at hand (offloaded, or never loaded)")
        yield from ("tensor", tensor.dtype, list(tensor.shape))
        try:
            data = tensor.detach().cpu().contiguous().flatten()
            yield data.view(torch.uint8).numpy() if data.numel() else b""
        except (RuntimeError, TypeError, NotImplementedError) as error:
            raise NoDigestError(f"{name} is a {type(tensor).__name__}, whose content cannot be read: {error}") from error

    def _model(self, model: nn.Module, name: str) -> Iterator[Any]:
        """Parameters, buffers, the config, and what the modules do with them: classes, settings, adapters that are on."""
        yield "model"
        yield self.of(_config_of(model), name)
        for key, module in model.named_modules():
            yield from (key, self.of(type(module), name), self.of(_plain_attributes(module), name))
            processor = vars(module).get("processor")  # of attention; one with parameters is a module by itself
            if processor is not None:
                yield from (type(processor).__qualname__, self.of(_plain_attributes(processor), name))
            if isinstance(patched := vars(module).get("forward"), types.FunctionType | types.MethodType):
                yield self.of(patched, f"the forward of {key or 'the model'} in {name}")
        for key, tensor in (*model.named_parameters(), *model.named_buffers()):
            yield from (key, self.of(tensor, f"{key} of {name}"))

    def _module(self, module: types.ModuleType, name: str) -> Iterator[Any]:
        """A user's own module by its file and by what is in it now: variables with plain values, and the modules it took from."""
        yield from ("module", module.__name__)
        file = getattr(module, "__file__", None)
        if _is_installed(module.__name__) or not file:
            yield _installed_version(module.__name__)
            return
        yield file_digest(Path(file))
        for variable, value in sorted(vars(module).items()):
            if variable.startswith("__"):
                continue
            if _is_plain(value):
                yield from (variable, self.of(value, f"{variable} of {name}"))
            source = value if isinstance(value, types.ModuleType) else sys.modules.get(getattr(value, "__module__", None) or "")
            if source is not None and source is not module and not _is_installed(source.__name__):
                yield from (variable, self.of(source, name))

    def _class(self, cls: type, name: str) -> Iterator[Any]:
        yield from ("class", cls.__module__, cls.__qualname__)
        if _is_installed(cls.__module__):
            yield _installed_version(cls.__module__)
            return
        yield from (self.of(base, name) for base in cls.__bases__)
        for key, value in sorted(vars(cls).items()):
            if key in OF_EVERY_CLASS or key.startswith("_abc_"):
                continue
            value = value.__func__ if isinstance(value, staticmethod | classmethod) else value
            parts = [value.fget, value.fset] if isinstance(value, property) else value
            told = isinstance(value, property | types.FunctionType) or _is_plain(value)
            yield from (key, self.of(parts, f"{key} of {name}") if told else type(value).__qualname__)

    def _callable(self, function: Any, name: str) -> Iterator[Any]:
        if isinstance(function, functools.partial):
            yield from ("partial", self.of([function.func, function.args, function.keywords], name))
        elif isinstance(function, types.MethodType):
            yield from ("method", self.of(function.__func__, name))
            yield self.of(function.__self__, f"the object that {name} is a method of")
        elif isinstance(function, types.FunctionType):
            yield from self._function(function, name)
        elif isinstance(getattr(function, "__wrapped__", None), types.FunctionType):
            yield self.of(function.__wrapped__, name)
        elif isinstance(function, BUILTIN):
            yield from ("builtin", getattr(function, "__qualname__", function.__name__))
            owner = getattr(function, "__self__", None)
            if owner is not None and not isinstance(owner, types.ModuleType):
                yield self.of(owner, f"the object that {name} is a method of")
        else:
            yield from self._object(function, name)

    def _function(self, function: types.FunctionType, name: str) -> Iterator[Any]:
        """The code, the defaults, and the variables of enclosing functions and of the module that it refers to."""
        yield "function"
        installed = _is_installed(function.__module__)
        if installed:
            yield from (function.__module__, function.__qualname__, _installed_version(function.__module__))
        else:
            yield from (self.of(function.__code__, name), self.of([function.__defaults__, function.__kwdefaults__], name))
        variables = {}
        for variable, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
            with suppress(ValueError):  # not assigned yet
                variables[variable] = cell.cell_contents
        if not installed:
            known = function.__globals__
            variables |= {variable: known[variable] for variable in _global_names(function.__code__) if variable in known}
            package = known.get("__package__") or ""
            variables |= {f"import {found}": _found(found) for found in _imports(function.__code__, package)}
        for variable, value in sorted(variables.items(), key=lambda item: item[0]):
            yield from (variable, self.of(value, f"`{variable}`, which {name} refers to,"))

    def _object(self, value: Any, name: str) -> Iterator[Any]:
        content = _content(value)
        if content is None:
            raise NoDigestError(f"{name} is a {type(value).__qualname__}, whose content cannot be told from another's")
        yield from ("object", self.of(type(value), name), self.of(content, name))


def _hash(parts: Iterable[Any]) -> str:
    """Hash of texts and bytes, each preceded by its length, so that different sequences hash differently."""
    found = hashlib.sha256()
    for part in parts:
        data: Any = part if isinstance(part, bytes | np.ndarray) else str(part).encode()
        found.update(f"{len(data)}:".encode())
        found.update(data)
    return found.hexdigest()


def _content(value: Any) -> Any:
    """The parts of an object as a list or mapping; ``None`` if its kind is unknown."""
    if isinstance(value, NAMED_BY_REPR):
        return [str(value)]
    if isinstance(value, enum.Enum):
        return [value.name]
    if isinstance(value, np.ndarray):
        return [str(value.dtype), list(value.shape), value.tolist() if value.dtype.hasobject else value.tobytes()]
    if isinstance(value, np.generic):
        return [str(value.dtype), value.tobytes()]
    if isinstance(value, Image.Image):
        return [value.mode, list(value.size), value.tobytes()]
    if isinstance(value, torch.Generator):
        return [str(value.device.type), value.get_state()]
    if isinstance(value, slice):
        return [value.start, value.stop, value.step]
    if isinstance(value, re.Pattern):
        return [value.pattern, value.flags]
    if isinstance(value, logging.Logger | logging.LoggerAdapter):
        return []  # it has no effect on the result
    return _state(value)


def _state(value: Any) -> Any:
    """The parts of pipelines, tokenizers, processors, dataclasses, and objects of users' own classes."""
    if isinstance(components := getattr(value, "components", None), Mapping) and hasattr(value, "config"):
        return pipeline_parts(value)
    if hasattr(value, "get_vocab"):
        return _tokenizer(value)
    if isinstance(value, ConfigMixin):
        return _config_of(value)
    if callable(to_dict := getattr(value, "to_dict", None)) and _is_installed(type(value).__module__):
        return _without_incidentals(to_dict())
    if is_dataclass(value):
        return {field.name: getattr(value, field.name) for field in fields(value)}
    own = not any(base.__module__ not in BARE and _is_installed(base.__module__) for base in type(value).__mro__)
    return _attributes(value) if own and hasattr(value, "__dict__") and components is None else None


def _attributes(value: Any) -> dict[str, Any]:
    """Attributes of an object, those in slots included."""
    names = {name: None for cls in type(value).__mro__ for name in _slots(cls) if hasattr(value, name)}
    return {name: getattr(value, name) for name in names} | getattr(value, "__dict__", {})


def _slots(cls: type) -> list[str]:
    slots = vars(cls).get("__slots__", ())
    names = [slots] if isinstance(slots, str) else list(slots)
    private = f"_{cls.__name__.lstrip('_')}"
    return [f"{private}{name}" if name.startswith("__") and not name.endswith("__") else name for name in names]


def pipeline_parts(pipe: Any) -> dict[str, Any]:
    """The components of a pipeline, and its class, config and public settings, such as ``vae_scale_factor``, as its "pipeline"."""
    own = {key: value for key, value in _plain_attributes(pipe).items() if not key.startswith("_")}
    config = {key: value for key, value in (_config_of(pipe) or {}).items() if key not in pipe.components}
    return {**pipe.components, "pipeline": [type(pipe), own, config]}


def _config_of(value: Any) -> dict[str, Any] | None:
    """The config that an object of diffusers or transformers was made from; ``None`` if it has none."""
    config = getattr(value, "config", None)
    if not isinstance(config, Mapping):
        to_dict = getattr(config, "to_dict", None)
        config = to_dict() if callable(to_dict) else None
    return None if config is None else _without_incidentals(config)


def _without_incidentals(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config without paths, versions and remarks, and without ``_use_default_values``, whose order differs between processes."""
    return {key: value for key, value in config.items() if not str(key).startswith("_") and key not in INCIDENTAL}


def _tokenizer(value: Any) -> list[Any]:
    backend = getattr(value, "backend_tokenizer", None)
    if backend is not None:
        rules = json.loads(backend.to_str())
        rules = {key: item for key, item in rules.items() if key not in ("truncation", "padding")}  # set by every call
    else:
        rules = {"vocabulary": value.get_vocab()}
    settings = {key: item for key, item in _without_incidentals(getattr(value, "init_kwargs", {})).items() if _is_plain(item)}
    return [rules, settings, {key: item for key, item in _plain_attributes(value).items() if not key.startswith("_")}]


def _plain_attributes(value: Any) -> dict[str, Any]:
    """Public attributes that are plain values, and PEFT's own of which adapters are on."""
    public = {key: item for key, item in vars(value).items() if not key.startswith("_") or key in ADAPTERS}
    return {key: item for key, item in public.items() if key not in INCIDENTAL and key != "init_kwargs" and _is_plain(item)}


def _is_plain(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(map(_is_plain, value)) and all(map(_is_plain, value.values()))
    if isinstance(value, list | tuple | set | frozenset):
        return all(map(_is_plain, value))
    return isinstance(value, PLAIN)


def _global_names(code: types.CodeType) -> Iterator[str]:
    """Names that code, and the functions in it, look up among the globals."""
    for instruction in dis.get_instructions(code):
        if instruction.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
            yield instruction.argval
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _global_names(constant)


def _imports(code: types.CodeType, package: str) -> Iterator[str]:
    """Full names of modules that code, and the functions in it, import when they run, and of what is taken from them."""
    level = 0
    for instruction in dis.get_instructions(code):
        if instruction.opname in ("LOAD_CONST", "LOAD_SMALL_INT") and type(instruction.argval) is int:
            level = instruction.argval
        elif instruction.opname == "IMPORT_NAME":
            base = package.rsplit(".", level - 1)[0] + "." if level else ""
            found = (base + instruction.argval).rstrip(".")
            yield found
        elif instruction.opname == "IMPORT_FROM":
            yield f"{found}.{instruction.argval}"
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _imports(constant, package)


def _found(module: str) -> types.ModuleType | str | None:
    """A module of the user's own, imported; the name of another; ``None`` if it cannot be imported."""
    top = module.partition(".")[0]
    if top in sys.stdlib_module_names or top in OWN:
        return top
    try:
        spec = importlib.util.find_spec(module)
        installed = spec is None or not INSTALLED.isdisjoint(Path(spec.origin or "").parts)
        return module if installed else importlib.import_module(module)
    except (ImportError, ValueError):
        return None


@functools.lru_cache(maxsize=512)
def _is_installed(module: str | None) -> bool:
    """Whether a module belongs to Python, to an installed package or to this one, whose version says what it does."""
    top = (module or "").partition(".")[0]
    file = getattr(sys.modules.get(module or ""), "__file__", None) or ""
    return top in sys.stdlib_module_names or top in OWN or not INSTALLED.isdisjoint(Path(file).parts)


@functools.lru_cache(maxsize=512)
def _installed_version(module: str) -> str:
    top = module.partition(".")[0]
    names = _distributions().get(top)
    return (_version(names[0]) or "") if names else _python_version()


@functools.cache
def _distributions() -> Mapping[str, list[str]]:
    """Installed packages by the modules that belong to them, which takes half a second to find out."""
    return packages_distributions()


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _python_version() -> str:
    return ".".join(map(str, sys.version_info[:2]))
