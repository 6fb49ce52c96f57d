"""``qdiff inspect``"""

from __future__ import annotations

from typing import Annotated

import typer
from rich.table import Table

from ..checkpoint import CheckpointInfo, inspect_components
from .console import stdout


def inspect(
    source: Annotated[str, typer.Argument(help="Folder or Hub name of a quantized model or pipeline.")],
    revision: Annotated[str | None, typer.Option(help="Of a Hub repository.")] = None,
) -> None:
    """List a checkpoint's layers: method, bits, size and error. Nothing is loaded."""
    console = stdout()
    for info in inspect_components(source, revision):
        console.print(_layers(info))
        console.print(_totals(info))


def _layers(info: CheckpointInfo) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold", title=str(info.folder), title_justify="left")
    table.add_column("Layer", overflow="fold")
    table.add_column("Method")
    table.add_column("Stored as", overflow="fold")
    for heading in ("Shape", "Bits", "Size", "Error"):
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
        )
    return table


def _totals(info: CheckpointInfo) -> str:
    dense = 2 * info.packed_weights
    lines = [
        f"{len(info.layers)} packed layers: {info.packed_weights / 1e6:.2f} M weights, {info.bits_per_weight:.2f} bits each, "
        f"{size(info.packed_bytes)} ({size(dense)} in 16 bits)",
        f"all files: {size(info.total_bytes)}; {len(info.config.skipped)} layers left as they were",
    ]
    lines += [f"{name.replace('_', ' ')}: {value}" for name, value in info.config.provenance.items()]
    return "\n".join(["", *lines, "[dim]Error: squared error of the weights over their squared norm.[/]"])


def size(nbytes: int) -> str:
    """Bytes for people, in powers of 1000 as disks count."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if nbytes >= scale:
            return f"{nbytes / scale:.2f} {unit}"
    return f"{nbytes} B"
