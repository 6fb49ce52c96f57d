"""At how many tokens another strategy for the product becomes faster: the measured table in configs/cpu.json."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

CONFIG = Path(__file__).parent.parent / "configs" / "cpu.json"


@lru_cache(maxsize=1)
def table() -> dict[str, Any]:
    """The file's contents; its comment says what they mean."""
    return json.loads(CONFIG.read_text())


def few_tokens(kind: str, bits_per_weight: float, activations: str) -> int:
    """Largest number of tokens for the packed product of a format: "narrow" weights have up to 4 bits."""
    by_width = table()["few_tokens"]["int8" if activations == "int8" else "other"][kind]
    return by_width["narrow" if bits_per_weight <= 4 else "wide"]


def integer_tokens(kind: str, activations: str) -> int:
    """Largest number of tokens for the packed product in integers, which repeats more work for each than the one in bfloat16."""
    return table()["integer_tokens"]["int8" if activations == "int8" else "other"][kind]
