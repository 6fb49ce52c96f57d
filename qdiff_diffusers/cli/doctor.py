"""``qdiff doctor``"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from ..integrations.patches import examine
from ..integrations.table import TABLE
from ..measuring.machine import DISTRIBUTION, cpu_count, package_version, processor_name
from .console import stdout

REQUIRED = ("torch", "diffusers", "accelerate", "safetensors", "huggingface-hub")
OPTIONAL = {
    "triton": "compiled GPU kernels",
    "numba": "compiled CPU kernels",
    "transformers": "text encoders, which most pipelines need",
    "peft": "LoRA adapters on quantized models",
    "matplotlib": "plots in reports",
}
# Instruction sets that decide how fast low-precision arithmetic runs on a CPU, by their names in /proc/cpuinfo.
CPU_FEATURES = {
    "avx2": "AVX2",
    "avx512f": "AVX-512",
    "avx512_bf16": "AVX-512 bf16",
    "avx512_vnni": "AVX-512 int8 (VNNI)",
    "amx_bf16": "AMX bf16",
    "amx_int8": "AMX int8",
    "asimd": "NEON",
    "bf16": "Arm bf16",
    "i8mm": "Arm int8 (i8mm)",
    "sve": "SVE",
}
WIDTH = 100


def doctor() -> None:
    """List packages, devices and the kernels that will run on them, and name what is missing."""
    console = stdout()
    console.width = min(console.width, WIDTH)
    for title, table in (
        ("Packages", _packages()),
        ("Devices", _devices()),
        ("Kernels by device (torch is the reference implementation, which runs everywhere)", _kernels()),
        ("Backend", _backend()),
        ("What qdiff changes in other libraries", _patches()),
    ):
        console.print(f"[bold]{title}[/]")
        console.print(table)
        console.print()
    _problems(console)


def _grid() -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    return table


def _packages() -> Table:
    table = _grid()
    table.add_row("  qdiff", package_version(DISTRIBUTION) or "not installed, running from source", "")
    for name in REQUIRED:
        table.add_row(f"  {name}", package_version(name) or "[red]missing[/]", "")
    for name, use in OPTIONAL.items():
        found = package_version(name)
        table.add_row(f"  {name}", found or "[yellow]missing[/]", "" if found else f"[dim]would give: {use}[/]")
    return table


def _devices() -> Table:
    table = _grid()
    threads = torch.get_num_threads()
    table.add_row("  cpu", f"{processor_name()}, {cpu_count()} cores, torch uses {threads} threads")
    table.add_row("", ", ".join(cpu_features()) or "no known vector instructions")
    for i in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(i)
        memory = f"{properties.total_memory / 2**30:.0f} GiB"
        table.add_row(f"  cuda:{i}", f"{properties.name}, {memory}, compute capability {properties.major}.{properties.minor}")
    if hasattr(torch, "xpu") and torch.xpu.is_available():
        table.add_row("  xpu", torch.xpu.get_device_name(0))
    if not torch.cuda.is_available():
        reason = "no GPU was found" if torch.version.cuda or torch.version.hip else "this torch is built without CUDA"
        table.add_row("  cuda", f"[dim]{reason}[/]")
    return table


def _kernels() -> Table:
    import qdiff_kernels

    table = Table(box=None, pad_edge=False, padding=(0, 2), header_style="dim")
    ops = {op: chosen for op, chosen in qdiff_kernels.implementations().items() if not op.endswith("_input_gradient")}
    devices = sorted({device for chosen in ops.values() for device in chosen})
    table.add_column("  op", no_wrap=True)
    for device in devices:
        table.add_column(device)
    for op, chosen in ops.items():
        table.add_row(f"  {op}", *(chosen.get(device, "") for device in devices))
    return table


def _backend() -> Table:
    table = _grid()
    for library in ("diffusers", "transformers"):
        table.add_row(f"  {library}", "qdiff is registered" if is_registered(library) else "[yellow]qdiff is not registered[/]")
    on = "on" if loads_by_itself() else "[yellow]off[/], checkpoints load after `import qdiff_diffusers`"
    table.add_row("  loading with nothing imported", on)
    return table


def _patches() -> Table:
    """Number of active changes in each library, and the features that are off because a change found no target."""
    table = _grid()
    found = examine(TABLE)
    for library in dict.fromkeys(row.library for row in found):
        names = [state.name for row, state in found.items() if row.library == library]
        counts = (f"{names.count(name)} {name}" for name in dict.fromkeys(names))
        table.add_row(f"  {library}", ", ".join(counts))
    for row, state in found.items():
        if state.name == "off":
            table.add_row("", f"[yellow]off[/]: {row.feature}, for lack of {row.target} ({state.reason})")
    return table


def loads_by_itself() -> bool:
    """Whether torch loads qdiff by its entry point, so that checkpoints load with nothing imported."""
    autoload = sys.modules.get("qdiff_autoload")
    return autoload is not None and autoload.is_on()


def _problems(console: Console) -> None:
    missing = [name for name in REQUIRED if not package_version(name)]
    if missing:
        console.print(f"[red]Install {', '.join(missing)}: qdiff cannot work without.[/]")
    elif not is_registered("diffusers"):
        console.print("[red]diffusers does not know qdiff: its version may be too new or too old.[/]")
    else:
        console.print("[green]Ready.[/]")


def is_registered(library: str) -> bool:
    """Whether ``from_pretrained`` of "diffusers" or "transformers" will recognise a qdiff checkpoint."""
    from ..config import QDiffMethod

    if importlib.util.find_spec(library) is None:
        return False
    tables = importlib.import_module(f"{library}.quantizers.auto")
    name = QDiffMethod.QDIFF.value
    return name in tables.AUTO_QUANTIZER_MAPPING and name in tables.AUTO_QUANTIZATION_CONFIG_MAPPING


def cpu_features() -> list[str]:
    """The CPU's instruction sets for low-precision arithmetic, as far as the operating system lists them."""
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.is_file():
        return []
    for line in cpuinfo.read_text().splitlines():
        key, _, value = line.partition(":")
        if key.strip() in ("flags", "Features"):
            flags = set(value.split())
            return [label for flag, label in CPU_FEATURES.items() if flag in flags]
    return []
