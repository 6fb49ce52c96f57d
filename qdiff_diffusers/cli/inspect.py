"""``qdiff inspect``"""

from __future__ import annotations

from typing import Annotated

import typer
from rich.table import Table

from ..checkpoint.inspect import CheckpointInfo, inspect_components, zero_shares
from .console import progress_bars, stdout


def inspect(
    source: Annotated[str, typer.Argument(help="Folder or Hub name of a quantized model or pipeline.")],
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a source on the Hub.")] = None,
    sparsity: Annotated[
        bool, typer.Option("--sparsity", help="Also count weights that are stored as zero; reads all codes.")
    ] = False,
) -> None:
    """List the layers of a checkpoint with method, bits, size and error. Only --sparsity reads weights."""
    console = stdout()
    for info in inspect_components(source, revision):
        zeros = _zeros(info) if sparsity else None
        console.print(_layers(info, zeros))
        console.print(_totals(info, zeros))


def _zeros(info: CheckpointInfo) -> dict[str, float]:
    """Share of weights stored as zero in every layer, by its name."""
    with progress_bars() as bars:
        return dict(bars.track(zero_shares(info), len(info.layers), description="Counting zeros"))


def _layers(info: CheckpointInfo, zeros: dict[str, float] | None) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold", title=str(info.folder), title_justify="left")
    table.add_column("Layer", overflow="fold")
    table.add_column("Method")
    table.add_column("Stored as", overflow="fold")
    for heading in ("Shape", "Bits", "Size", "Error", *(["Zeros"] if zeros else [])):
        table.add_column(heading, justify="right", no_wrap=True)
    for layer in info.layers:
        table.add_row(
            layer.name,
            layer.method,
            layer.description,
            " x ".join(map(str, layer.shape)),
            f"{layer.bits_per_weight:.2f}",
            size(layer.nbytes),
            "" if layer.error is None else f"{layer.error:.2e}",
            *([f"{zeros[layer.name]:.2%}"] if zeros else []),
        )
    return table


def _totals(info: CheckpointInfo, zeros: dict[str, float] | None) -> str:
    dense = 2 * info.packed_weights
    lines = [
        f"{len(info.layers)} packed layers: {info.packed_weights / 1e6:.2f} M weights, {info.bits_per_weight:.2f} bits each, "
        f"{size(info.packed_bytes)} ({size(dense)} in 16 bits)",
        f"all files: {size(info.total_bytes)}; {len(info.config.skipped)} layers left as they were",
    ]
    if zeros:
        share = sum(zeros[layer.name] * layer.num_weights for layer in info.layers) / max(1, info.packed_weights)
        lines.append(f"sparsity: {share:.2%} of the packed weights are stored as exactly zero")
    lines += [f"{name.replace('_', ' ')}: {value}" for name, value in info.config.provenance.items()]
    return "\n".join(["", *lines, "[dim]Error: squared error of the weights over their squared norm.[/]"])


def size(nbytes: int) -> str:
    """A number of bytes with its unit, in powers of 1000 as disks count."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if nbytes >= scale:
            return f"{nbytes / scale:.2f} {unit}"
    return f"{nbytes} B"
