"""The nodes. Their schemas do without the qdiff package, so that a missing one is an error message and not a missing node; what it
knows, the methods and their choices, is asked of it where it is there."""

from __future__ import annotations

from .clip import LoadCLIP
from .inspect import Compare, ModelInfo, Report
from .load import LoadModel
from .pipeline import LoadPipeline, SamplePipeline
from .quantize import QuantizeModel, SaveModel

NODES = [LoadModel, LoadCLIP, QuantizeModel, SaveModel, LoadPipeline, SamplePipeline, ModelInfo, Report, Compare]
