"""qdiff: diffusion models at 2 to 8 bits. Importing it registers the backend with diffusers."""

from __future__ import annotations

from .api import quantize
from .calibration import Calibration, Tuning
from .checkpoint.inspect import CheckpointInfo, LayerInfo, inspect_checkpoint
from .checkpoint.quantization import Quantization
from .config import AQConfig, FPConfig, QDiffConfig, RTNConfig, SVDQuantConfig, VQConfig
from .errors import CalibrationError, CheckpointError, ConfigError, OutputError, QDiffError
from .integrations.registration import register
from .methods import Method, register_method
from .methods.targets import target_config
from .model.high_precision_steps import high_precision_steps
from .version import package_version

__version__ = package_version()

__all__ = [
    "AQConfig",
    "Calibration",
    "CalibrationError",
    "CheckpointError",
    "CheckpointInfo",
    "ConfigError",
    "FPConfig",
    "LayerInfo",
    "Method",
    "OutputError",
    "QDiffConfig",
    "QDiffError",
    "Quantization",
    "RTNConfig",
    "SVDQuantConfig",
    "Tuning",
    "VQConfig",
    "high_precision_steps",
    "inspect_checkpoint",
    "quantize",
    "register",
    "register_method",
    "target_config",
]

register()
