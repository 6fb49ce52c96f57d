"""Mixed precision: how many bits each layer gets where only the model's mean is given."""

from __future__ import annotations

import heapq
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from ..config import QDiffConfig
from ..methods import method_of

# The first pattern found in a layer's name tells its kind; "other" if none is. The names are those of diffusers and transformers.
KINDS = {
    kind: re.compile(pattern)
    for kind, pattern in {
        "modulation": r"norm\w*\.linear|adaln|modulation|_mod\.|emb\w*\.linear|time_emb|embedder|scale_shift",
        "query_key": r"(to|add)_[qk](_proj)?$|\b[qk]_proj$|\.(query|key)$",
        "value_out": r"attn|attention|to_v|to_out|qkv",
        "feed_forward": r"\bff|mlp|feed_forward|\bfc\d|DenseReluDense",
        "shortcut": r"shortcut|skip_conn",
        "convolution": r"conv|resnets|samplers",
    }.items()
}
# What a relative error in a kind's weights does to the model's output, per weight: rounded from what the bundled models showed,
# benchmarks/results/sensitivity.md.
SENSITIVITY = {
    "modulation": 0.06,
    "query_key": 0.25,
    "value_out": 1.0,
    "feed_forward": 1.25,
    "shortcut": 10.0,
    "convolution": 1.0,
    "other": 1.0,
}
# The narrow levels of a UNet work at its highest resolution and stand nearest to its output: each halving of the width made a
# convolution's weight count 25 to 55 times as much. 2**4 is on the safe side of that; a transformer has one width.
WIDTH_EXPONENT = 4


class Choice(NamedTuple):
    """One bit width, or rank, that a layer can have.

    Attributes:
        stored: stored bits per weight, everything counted.
        loss: what this layer would add to the model's loss.
        settings: changes to the layer's config, one of ``config.alternatives()``.
    """

    stored: float
    loss: float
    settings: dict[str, Any]


def kind_of(name: str) -> str:
    """Kind of a layer (a key of ``SENSITIVITY``) by its full name."""
    return next((kind for kind, pattern in KINDS.items() if pattern.search(name)), "other")


def width_of(shape: tuple[int, ...]) -> int:
    """Channels of the resolution level that a weight ``[out, in, ...]`` belongs to: the fewer of its outputs and inputs."""
    return min(shape[:2])


def spread_by_kind(targets: Mapping[str, QDiffConfig], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, QDiffConfig]:
    """Choose bit widths by kind of layer where ``config.by_kind`` is set; their mean stays what the configs ask for.

    The model assumes that a weight's squared error falls to a quarter with each bit and is weighted by ``SENSITIVITY`` of the
    layer's kind and by the layer's width.

    Args:
        targets: config of each layer.
        shapes: shape of each layer's weight.

    Returns:
        ``targets`` with other ``bits``.
    """
    chosen = {name: config for name, config in targets.items() if config.by_kind}
    choices, budget = {}, 0.0
    sizes = {name: math.prod(shapes[name]) for name in chosen}
    widest = max((width_of(shapes[name]) for name in chosen), default=1)
    for name, config in chosen.items():
        unit = SENSITIVITY[kind_of(name)] * (widest / width_of(shapes[name])) ** WIDTH_EXPONENT * sizes[name]
        offers = {bits: method_of(config).stored_bits(replace(config, bits=bits), shapes[name]) for bits in config.widths}
        choices[name] = [Choice(stored, unit * 4**-bits, {"bits": bits}) for bits, stored in offers.items()]
        budget += offers[float(config.bits or 0)] * sizes[name]
    return with_settings(targets, allocate_bits(choices, sizes, budget))


def with_settings(targets: Mapping[str, QDiffConfig], settings: Mapping[str, dict[str, Any]]) -> dict[str, QDiffConfig]:
    """``targets`` with ``settings`` applied; a config that would not change is the same object."""
    return {
        name: config if has_settings(config, settings.get(name, {})) else replace(config, **settings[name])
        for name, config in targets.items()
    }


def has_settings(config: QDiffConfig, settings: Mapping[str, Any]) -> bool:
    return all(getattr(config, key) == value for key, value in settings.items())


def allocate_bits(choices: Mapping[str, Sequence[Choice]], sizes: Mapping[str, int], budget: float) -> dict[str, dict[str, Any]]:
    """Start every layer at its fewest bits, then add bits where they lower the expected loss most per stored bit.

    Args:
        choices: what each layer can have, in any order.
        sizes: number of weights of each layer.
        budget: stored bits of all weights together. The fewest bits are given even where they exceed it.

    Returns:
        the settings of the choice made for each layer.
    """
    choices = {name: sorted(offers, key=lambda choice: choice[:2]) for name, offers in choices.items()}
    level = dict.fromkeys(choices, 0)
    left = budget - sum(choices[name][0].stored * sizes[name] for name in choices)
    queue: list[tuple[float, str, int]] = []

    def offer(name: str) -> None:
        """Queue the layer's next step up, of any length: the one that lowers the loss most per added bit."""
        here = choices[name][level[name]]
        steps = [
            ((here.loss - there.loss) / ((there.stored - here.stored) * sizes[name]), i)
            for i, there in enumerate(choices[name])
            if i > level[name] and there.stored > here.stored and there.loss < here.loss
        ]
        if steps:
            gain, i = max(steps)
            heapq.heappush(queue, (-gain, name, i))

    for name in choices:
        offer(name)
    while queue:
        _, name, i = heapq.heappop(queue)
        price = (choices[name][i].stored - choices[name][level[name]].stored) * sizes[name]
        if price <= left:
            left -= price
            level[name] = i
            offer(name)
    return {name: choices[name][level[name]].settings for name in choices}
