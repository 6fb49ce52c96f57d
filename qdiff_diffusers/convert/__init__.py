"""Conversion between other programs' quantized checkpoints and qdiff's, by index maps and renaming: nothing is quantized again."""

from __future__ import annotations

from .bfl import convert_bfl
from .comfy import convert_comfy
from .comfy_export import export_comfy
from .gguf import convert_gguf
from .nunchaku_export import export_nunchaku
from .nunchaku_folder import convert_nunchaku

__all__ = ["convert_bfl", "convert_comfy", "convert_gguf", "convert_nunchaku", "export_comfy", "export_nunchaku"]
