"""Up to how many tokens a packed weight is multiplied without being decoded to memory: the measured table in configs/cpu.json."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path

CONFIG = Path(__file__).parent.parent / "configs" / "cpu.json"


@lru_cache(maxsize=1)
def table() -> dict[str, dict[str, int]]:
    """``{format: {"narrow" | "wide": tokens}}`` of configs/cpu.json."""
    return json.loads(CONFIG.read_text())["few_tokens"]


def few_tokens(kind: str, bits_per_weight: float, activations: str) -> int:
    """Largest number of tokens for the packed product of a format: "narrow" weights have up to 4 bits."""
    return table()[kind]["narrow" if bits_per_weight <= 4 else "wide"]
