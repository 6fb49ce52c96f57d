"""Lets torchvision be imported beside a torch without CUDA.

torchvision's wheels on the package index declare two operators in a library that such a torch cannot load, and its import then
fails at registering their shapes. ComfyUI only needs the rest of it. Imported at start through a .pth file, which scripts/comfy.sh
writes into the environment of the tests.
"""

from __future__ import annotations

import importlib.abc
import sys
from typing import Any

OPERATORS = ("nms", "qnms")


class DeclareOperators(importlib.abc.MetaPathFinder):
    """Declares the operators just before torchvision is imported, and steps aside."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name != "torchvision":
            return
        sys.meta_path.remove(self)
        import torch

        if torch.version.cuda is None:
            self.library = torch.library.Library("torchvision", "FRAGMENT")
            globals()["kept"] = self.library
            for operator in OPERATORS:
                self.library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


sys.meta_path.insert(0, DeclareOperators())
