"""Other programs' quantized checkpoints, to and from ours: index maps and renaming, nothing is quantized again."""

from __future__ import annotations

from .nunchaku_export import export_nunchaku
from .nunchaku_folder import convert_nunchaku

__all__ = ["convert_nunchaku", "export_nunchaku"]
