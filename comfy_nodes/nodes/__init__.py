"""The nodes. Nothing in their schemas needs the qdiff package, so that a missing one is an error message and not a missing node."""

from __future__ import annotations

from .load import LoadModel

NODES = [LoadModel]
