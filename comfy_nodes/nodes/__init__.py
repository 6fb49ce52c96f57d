"""The nodes. Their schemas do not need the qdiff package, so that without it nodes show an error message instead of being absent.
If it is installed, the methods and their choices come from it."""

from __future__ import annotations

from .clip import LoadCLIP
from .inspect import Compare, ModelInfo, Report
from .load import LoadModel
from .pipeline import LoadPipeline, SamplePipeline
from .quantize import QuantizeModel, SaveModel

NODES = [LoadModel, LoadCLIP, QuantizeModel, SaveModel, LoadPipeline, SamplePipeline, ModelInfo, Report, Compare]
