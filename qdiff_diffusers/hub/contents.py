"""A checkpoint's contents for its card: facts, settings and tables."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..checkpoint.inspect import CheckpointInfo, LayerInfo
from ..checkpoint.quantization import Quantization
from ..checkpoint.results import DENSE_SUFFIX, SAMPLES
from ..formats import CodebookFormat, MinifloatFormat
from ..methods import method_of

# The first kind whose pattern a layer's name matches, without the block and its number.
KINDS = (
    ("modulation (adaLN)", r"adaln|modulation|norm\d*(_context)?\.(linear|emb)|norm\d*\.|norm_"),
    ("embedding and projection", r"^(?!.*attn).*(emb|proj_in|proj_out|context_embedder|x_embedder)"),
    ("attention, query key value", r"to_(q|k|v|qkv)\b|add_(q|k|v)_proj|(q|k|v)_proj|\.(q|k|v)$|qkv|query|key|value"),
    ("attention, output", r"to_(add_)?out|out_proj|attn.*\.(o|proj)\b|SelfAttention\.o"),
    ("feed-forward", r"ff|mlp|feed_forward|\bnet\.|DenseReluDense|\bfc\d"),
    ("convolution", r"conv|resnets"),
)
SHOWN_FORMATS = 2


def layer_kind(name: str) -> str:
    """The kind of a layer for tables, such as "attention, query key value" for ``transformer_blocks.3.attn1.to_q``."""
    inner = re.split(r"\.\d+\.", name, maxsplit=1)[-1]
    return next((kind for kind, pattern in KINDS if re.search(pattern, inner)), "other")


def kind_rows(info: CheckpointInfo) -> list[dict[str, Any]]:
    """One row per kind of layer, the largest first: its formats, bits and size, and the error of its weights."""
    groups: dict[str, list[LayerInfo]] = defaultdict(list)
    for layer in info.layers:
        groups[layer_kind(layer.name)].append(layer)
    rows = [_row(kind, layers) for kind, layers in groups.items()]
    rows.sort(key=lambda row: -row["nbytes"])
    return [*rows, _row("**all**", info.layers) | {"formats": ""}] if len(rows) > 1 else rows


def _row(kind: str, layers: list[LayerInfo]) -> dict[str, Any]:
    nbytes = sum(layer.nbytes for layer in layers)
    weights = sum(layer.num_weights for layer in layers)
    known = [layer for layer in layers if layer.error is not None]
    counted = sum(layer.num_weights for layer in known)
    error = sum((layer.error or 0) * layer.num_weights for layer in known) / counted if counted else None
    formats = list(dict.fromkeys(layer.description for layer in layers))
    shown = "; ".join(formats[:SHOWN_FORMATS])
    return {
        "kind": kind,
        "count": len(layers),
        "formats": shown if len(formats) <= SHOWN_FORMATS else f"{shown}; {len(formats) - SHOWN_FORMATS} more",
        "bits": 8 * nbytes / weights,
        "nbytes": nbytes,
        "size": human_size(nbytes).replace(" ", "&nbsp;"),
        "dense_size": human_size(2 * weights).replace(" ", "&nbsp;"),
        "error": "" if error is None else f"{100 * error:.2g} %",
    }


def legend(components: list[CheckpointInfo]) -> str:
    """Explanation of the short names of the formats in use."""
    specs = [layer.spec for c in components for layer in c.config.layers.values()]
    formats = [spec.format for spec in specs]
    books = next((f for f in formats if isinstance(f, CodebookFormat)), None)
    floats = [f for f in formats if isinstance(f, MinifloatFormat)]
    groups = next((size for f in formats if isinstance(size := getattr(f, "group_size", None), int)), None)
    rank, rotation = (next((value for spec in specs if (value := getattr(spec, name))), 0) for name in ("rank", "rotation"))
    texts = {
        f"`{books and books.describe()}`": books and _explain_codebooks(books),
        "`e2m1`": floats and "a sign, 2 bits of exponent and 1 of mantissa (uz: the code of negative zero is one more level)",
        "`a/b`": any(len(f.encodings) > 1 for f in floats) and "each group of weights has the one of the two that is closer",
        f"`g{groups}`": groups and f"{groups} weights share a scale",
        "`per row`": any(getattr(f, "group_size", None) == "row" for f in formats) and "one scale for each output row",
        f"`rank {rank}`": rank and f"a low-rank branch of width {rank} runs beside the packed weights",
        f"`rotated {rotation}`": rotation and f"weights and inputs are turned by Hadamard matrices of {rotation} x {rotation}",
        "`smoothed`": any(spec.smooth for spec in specs) and "each input channel is divided by a factor that its weights carry",
    }
    return " ".join(f"{name}: {text}." for name, text in texts.items() if text)


def _explain_codebooks(f: CodebookFormat) -> str:
    origin = "which come with the package" if f.table else "which the layer brings"
    count = "a codebook" if f.num_codebooks == 1 else f"{f.num_codebooks} codebooks"
    return f"{count} of 2^{f.codebook_bits} entries for vectors of {f.vector_size} weights, {origin}"


def facts(config: Quantization, components: list[CheckpointInfo]) -> list[tuple[str, str]]:
    """The card's first table."""
    packed, weights = sum(c.packed_bytes for c in components), sum(c.packed_weights for c in components)
    total = sum(c.total_bytes for c in components)
    kinds = sorted({layer.spec.activations for c in components for layer in c.config.layers.values()})
    activations = ", ".join("16-bit" if kind == "none" else kind for kind in kinds)
    return [
        ("method", method_of(config.config).title),
        ("bits per weight as stored", f"{8 * packed / max(1, weights):.3f}"),
        ("packed weights", f"{weights / 1e6:.1f} M in {sum(len(c.layers) for c in components)} layers"),
        ("their size", f"{human_size(packed)} (16-bit: {human_size(2 * weights)})"),
        ("layers left as they were", str(sum(len(c.config.skipped) for c in components))),
        ("on disk with those", f"{human_size(total)} (16-bit: {human_size(total - packed + 2 * weights)})"),
        ("activations", activations),
    ]


def settings(config: Quantization) -> list[tuple[str, str]]:
    """Settings that differ from the method's defaults, and how the checkpoint was made."""
    chosen = {key: value for key, value in config.settings().items() if key not in ("method", "compute_dtype", "overrides")}
    rows = [(key, f"`{value}`") for key, value in chosen.items()]
    for pattern, other in (config.overrides or {}).items():
        told = "16 bits" if other is None else ", ".join(f"{k}={v}" for k, v in other.settings().items())
        rows.append((f"layers with `{pattern}` in their name", f"`{told}`"))
    rows.append(("dtype of everything else", f"`{config.compute_dtype or 'bfloat16'}`"))
    if package := config.provenance.get("package"):
        rows.append(("made with", str(package)))
    return rows


def sample_files(folder: Path) -> list[str]:
    """Names of the images in ``samples/``."""
    return sorted(p.name for p in (folder / SAMPLES).glob("*") if p.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp"))


def samples(files: Iterable[str]) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Images of ``samples/`` by their names: pairs ``NAME.png`` and ``NAME-16bit.png``, and the others."""
    found = {Path(name).stem: name for name in files}
    pairs, single = [], []
    for stem, name in found.items():
        if stem.endswith(DENSE_SUFFIX) and stem.removesuffix(DENSE_SUFFIX) in found:
            continue
        entry = {"title": stem.replace("_", " ").replace("-", " "), "path": f"{SAMPLES}/{name}"}
        if dense := found.get(stem + DENSE_SUFFIX):
            pairs.append(entry | {"dense": f"{SAMPLES}/{dense}"})
        else:
            single.append(entry)
    return pairs, single


def human_size(nbytes: float) -> str:
    """``12_345_678`` -> ``"12.3 MB"`` (decimal units, as the Hub shows them)."""
    for unit in ("B", "KB", "MB"):
        if nbytes < 1000:
            return f"{nbytes:.0f} B" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1000
    return f"{nbytes:.2f} GB"
