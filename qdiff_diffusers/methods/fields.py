"""What the fields of a config may hold, read off their annotations: one check for the settings of every method."""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterator
from dataclasses import fields
from functools import lru_cache
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

from ..errors import ConfigError


class Between(NamedTuple):
    """Bounds of a number, both allowed: ``Annotated[int, Between(1, 8)]``."""

    low: float
    high: float


def check_fields(config: Any) -> None:
    """Hold every field of a dataclass against its annotation; whole numbers of other libraries become Python's own.

    Annotations may be made of ``bool``, ``int``, ``float``, ``str``, ``None``, ``Literal``, ``list[...]``, ``dict`` and ``Any``;
    a range stands in ``Annotated[..., Between(low, high)]``. A bool is no number, and no number may be infinite or NaN.

    Raises:
        ConfigError: names class, field, what it may hold and the value.
    """
    cls: Any = type(config)
    for name, kinds in _kinds(cls).items():
        value = getattr(config, name)
        for kind in kinds:
            if kind.accepts(value):
                setattr(config, name, kind.plain(value))
                break
        else:
            wanted = sorted((text for kind in kinds for text in kind.texts()), key="None".__ne__)
            raise ConfigError(f"{type(config).__name__}: {name} must be {', '.join(wanted)}, got {value!r}")


class _Kind(NamedTuple):
    """One of the types that a field may have."""

    type: Any
    bounds: Between | None = None
    choices: tuple[Any, ...] = ()
    items: tuple[_Kind, ...] = ()

    def accepts(self, value: Any) -> bool:
        if self.type is Any:
            return True
        if self.choices:
            return any(type(value) is type(choice) and value == choice for choice in self.choices)
        if self.type in (int, float):
            number = numbers.Integral if self.type is int else numbers.Real
            if not isinstance(value, number) or isinstance(value, bool) or not math.isfinite(value):
                return False
            return self.bounds is None or bool(self.bounds.low <= value <= self.bounds.high)  # type: ignore[operator]
        if self.type is list:
            return isinstance(value, list | tuple) and all(any(kind.accepts(item) for kind in self.items) for item in value)
        return isinstance(value, self.type)

    def plain(self, value: Any) -> Any:
        if self.type is int and type(value) is not int:
            return int(value)
        if self.type is float and type(value) not in (int, float):
            return float(value)
        return list(value) if self.type is list else value

    def texts(self) -> Iterator[str]:
        if self.choices:
            yield from map(repr, self.choices)
        elif self.type in (int, float):
            number = "an integer" if self.type is int else "a number"
            yield number if self.bounds is None else f"{number} from {self.bounds.low} to {self.bounds.high}"
        elif self.type is bool:
            yield "True or False"
        elif self.type is list:
            yield f"a list of {' or '.join(text for kind in self.items for text in kind.texts())}"
        else:
            yield {NoneType: "None", str: "a string", dict: "a dict", Any: "anything"}.get(self.type, str(self.type))


@lru_cache(maxsize=128)
def _kinds(cls: type) -> dict[str, tuple[_Kind, ...]]:
    try:
        hints = get_type_hints(cls, include_extras=True)
    except NameError as error:
        raise ConfigError(f"the annotations of {cls.__name__} cannot be read: {error}; import it in the config's module") from error
    return {f.name: tuple(_flat(hints[f.name])) for f in fields(cls)}


def _flat(hint: Any, bounds: Between | None = None) -> Iterator[_Kind]:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        yield from _flat(arguments[0], next((extra for extra in arguments[1:] if isinstance(extra, Between)), None))
    elif origin in (Union, UnionType):
        for argument in arguments:
            yield from _flat(argument, bounds)
    elif origin is Literal:
        yield _Kind(Literal, choices=arguments)
    elif origin is list:
        yield _Kind(list, items=tuple(_flat(arguments[0])))
    else:
        yield _Kind(origin or hint, bounds)
