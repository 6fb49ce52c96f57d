"""Calibration: quantization for the inputs that layers have on the model's own trajectories, without training data."""

from __future__ import annotations

from .run import calibrate, check_places, discard_workspace
from .settings import Calibration, Tuning, as_calibration

__all__ = ["Calibration", "Tuning", "as_calibration", "calibrate", "check_places", "discard_workspace"]
