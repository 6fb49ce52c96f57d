"""Patterns without effect: parts of module names in a config that match no layer, or that earlier patterns shadow."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple

from diffusers.utils import logging

from ..config import QDiffConfig

logger = logging.get_logger(__name__)

Pattern = tuple[str, str]  # field of the config, and the pattern in it
Unmatched = dict[Pattern, str]  # a message for each pattern without effect


class Checked(NamedTuple):
    """Effect of a config's patterns on one model."""

    patterns: list[Pattern]
    unmatched: Unmatched


_gathering: ContextVar[list[Checked] | None] = ContextVar("gathering over several models", default=None)


def check_patterns(config: QDiffConfig, modules: Collection[str], layers: Collection[str], where: str) -> None:
    """Warn once of each pattern of a config that has no effect on a model, and name the most similar module names.

    Args:
        config: config whose ``modules_to_not_convert`` and ``overrides`` are checked.
        modules: names of all of the model's modules.
        layers: names of the modules that have a weight to quantize.
        where: name of the model for the message.
    """
    found = unmatched(config, modules, layers, where)
    gathered = _gathering.get()
    if gathered is None:
        _warn(found)
    else:
        gathered.append(Checked(_patterns(config), found))


@contextmanager
def one_config_for_all() -> Iterator[None]:
    """A context for quantizing several models with one config: only a pattern without effect on all of them is warned of."""
    if _gathering.get() is not None:
        yield
        return
    gathered: list[Checked] = []
    token = _gathering.set(gathered)
    try:
        yield
    finally:
        _gathering.reset(token)
    told = {pattern: text for checked in gathered for pattern, text in checked.unmatched.items()}
    at_work = {pattern for checked in gathered for pattern in checked.patterns if pattern not in checked.unmatched}
    _warn({pattern: text for pattern, text in told.items() if pattern not in at_work})


def _patterns(config: QDiffConfig) -> list[Pattern]:
    fields = {"modules_to_not_convert": config.modules_to_not_convert or (), "overrides": config.overrides or ()}
    return [(field, pattern) for field, patterns in fields.items() for pattern in patterns]


def unmatched(config: QDiffConfig, modules: Collection[str], layers: Collection[str], where: str) -> Unmatched:
    """A message for each pattern that matches no module, and for each of ``overrides`` that earlier patterns shadow."""
    skips, overrides = config.modules_to_not_convert or [], list(config.overrides or {})
    out: Unmatched = {}
    for field, pattern in _patterns(config):
        if not any(pattern in name for name in modules):
            near = nearest_names(pattern, modules)
            hint = f"; near it are {', '.join(near)}" if near else ""
            out[field, pattern] = f"{field}: no module of {where} has {pattern!r} in its name{hint}"
    left = [name for name in layers if not any(pattern in name for pattern in skips)]
    for i, pattern in enumerate(overrides):
        named = [name for name in layers if pattern in name]
        if named and not any(pattern in name and not any(earlier in name for earlier in overrides[:i]) for name in left):
            out["overrides", pattern] = (
                f"overrides: {pattern!r} never applies in {where}: modules_to_not_convert or earlier overrides name the same layers"
            )
    return out


def nearest_names(pattern: str, modules: Collection[str]) -> list[str]:
    """Up to three parts of module names that a pattern may have been meant for."""
    length = pattern.count(".") + 1
    parts: dict[str, None] = {}
    for name in modules:
        segments = name.split(".")
        parts.update(dict.fromkeys(".".join(segments[i : i + length]) for i in range(len(segments) - length + 1)))
    return difflib.get_close_matches(pattern, parts, n=3, cutoff=0.5)


def _warn(found: Unmatched) -> None:
    for text in found.values():
        logger.warning(f"qdiff: {text}")
