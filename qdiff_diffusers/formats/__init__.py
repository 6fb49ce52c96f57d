"""Stored forms of a weight: what the bits mean, and nothing about how they were chosen or are multiplied."""

from __future__ import annotations

from .base import GroupSize, TensorInfo, WeightFormat, dtype_name, group_columns, scale_shape
from .codebook import CodebookFormat, codebook_table, load_shared_codebooks, table_shapes
from .integer import IntegerFormat
from .minifloat import MinifloatFormat
from .spec import FORMATS, LayerSpec, matrix_shape
from .transform import rotate_matrix, unrotate_matrix

__all__ = [
    "FORMATS",
    "CodebookFormat",
    "GroupSize",
    "IntegerFormat",
    "LayerSpec",
    "MinifloatFormat",
    "TensorInfo",
    "WeightFormat",
    "codebook_table",
    "dtype_name",
    "group_columns",
    "load_shared_codebooks",
    "matrix_shape",
    "rotate_matrix",
    "scale_shape",
    "table_shapes",
    "unrotate_matrix",
]
