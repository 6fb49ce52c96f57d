"""Settings of calibration and tuning."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..methods.inputs import NOISE_SHARE

OBJECTIVES = ("model", "blocks")
ASSIGNMENTS = ("pv", "candidates", "rounding", "fixed")
STARTS = ("distance", "uniform")
CODEBOOKS = ("with", "after", "fixed")
PRECISIONS = ("auto", "bfloat16", "float32")


@dataclass(frozen=True)
class Tuning:
    """Gradient descent on packed weights against the full-precision model, after every layer has been quantized by itself.

    Args:
        steps: number of optimizer steps, for the whole model or for each block; 0 for no tuning.
        minutes: time for the steps, instead of their number, which follows from a measurement at the start.
        objective: "model" follows the teacher's trajectories with the whole model (AQUATIC-Diff), "blocks" fits each repeated
            block to its own outputs (VQ4DiT).
        assignments: how codes change. "pv": straight-through weights, of which the ``fraction`` that moved furthest is encoded
            anew each step (PV-Tuning). "candidates": softmax ratios over the ``candidates`` nearest entries (VQ4DiT).
            "rounding": each weight of an integer or floating format learns whether to go up or down (AdaRound). "fixed": codes do
            not change. Ratios and roundings settle a few at a time, the surest first, all of them by four fifths of the steps.
        lr: learning rate of scales, codebooks, biases, norms and low-rank branches, relative to each tensor's size; falls linearly
            to 0.
        code_lr: learning rate of the straight-through weights (relative to their spread), or of the logits of ratios and roundings.
        fraction: share of the vectors whose codes may change in one step.
        candidates: number of nearest entries for each vector (n of VQ4DiT); 1 keeps the nearest.
        start: initial ratios, "uniform" (VQ4DiT's paper) or by "distance" (its released code).
        codebooks: whether entries learn together with the ratios of "candidates" ("with"), when those have settled ("after"), or
            not at all ("fixed").
        regularizer: weight of the term that pushes ratios to 0 and 1.
        reset_at_wrap: forget momentum where one trajectory ends and another begins (SeMI-PV).
        reset_changed: forget momentum of weights whose codes just changed (SeMI-PV).
        dense: also train the parameters that are not packed: biases, norms, embeddings.
        precision: of a float32 model's products and their gradients; parameters and the optimizer's state stay float32.
            "auto" is "bfloat16" where the processor has instructions for it, else "float32".
    """

    steps: int = 0
    minutes: float | None = None
    objective: str = "model"
    assignments: str = "pv"
    lr: float = 1e-3
    code_lr: float = 1e-2
    fraction: float = 1e-2
    candidates: int = 2
    start: str = "distance"
    codebooks: str = "with"
    regularizer: float = 1.0
    reset_at_wrap: bool = True
    reset_changed: bool = True
    dense: bool = True
    precision: str = "auto"

    def __post_init__(self) -> None:
        known = {"objective": OBJECTIVES, "assignments": ASSIGNMENTS, "start": STARTS, "codebooks": CODEBOOKS}
        known["precision"] = PRECISIONS
        for name, choices in known.items():
            if getattr(self, name) not in choices:
                raise ConfigError(f"tuning: {name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}")
        if self.steps < 0 or self.candidates < 1:
            raise ConfigError(f"tuning: steps must be 0 or more and candidates 1 or more, got {self.steps} and {self.candidates}")
        if self.minutes is not None and (self.steps or not self.minutes > 0):
            raise ConfigError(f"tuning: give steps or minutes above 0, got {self.steps} and {self.minutes!r}")
        if not 0 <= self.fraction <= 1:
            raise ConfigError(f"tuning: fraction must lie between 0 and 1, got {self.fraction!r}")

    @property
    def wanted(self) -> bool:
        """Whether any tuning is asked for."""
        return bool(self.steps or self.minutes)


@dataclass(frozen=True)
class Calibration:
    """Where calibration data come from: the full-precision model's own trajectories, nothing else.

    Args:
        prompts: prompts for a text-to-image pipeline: a list, or the path of a text file with one prompt per line.
        class_labels: labels for a class-conditional model. Without prompts and labels a model gets nothing but noise.
        run: a function that draws the trajectories instead of prompts and labels, ``run(pipe, samples, generators)`` with a list of
            sample numbers and their generators: for pipelines that need other arguments.
        samples: number of trajectories; prompts or labels are repeated or cut to it. By default one per prompt or label, or 16.
        steps: number of denoising steps of each trajectory.
        guidance_scale: guidance scale of the pipeline; ``None`` for its own default.
        scheduler: scheduler for a bare model, which has none; DDIM by default.
        batch_size: number of trajectories that run together.
        timesteps: number of steps of each trajectory to keep, evenly spaced; ``None`` for all.
        hessian: quantize each layer against its inputs' second moments rather than against its weights alone.
        noise_share: where activations have 4 bits, how far codes make up for the noise that this adds to the inputs: from 0, not at
            all, to 1, least error of every layer, but with its weak directions weakened at every step; see docs/calibration.md.
        mixed: let ``bits`` be the mean over all layers, and give more to those whose errors change the model's output
            most; where a low-rank branch's size is given as ``branch_bits``, the same for the rank.
        damping: number added to a Hessian's diagonal, relative to the diagonal's mean.
        tuning: settings of the second stage, none by default.
        seed: seeds the noise and everything else random.
        memory_limit: bytes of recorded tensors, or of Hessians, held in memory at a time; further recorded tensors go to disk.
        workspace: folder for finished work, from which an interrupted run resumes; by default beside the output.
        recordings: folder where trajectories and the layers' second moments stay for other calibrations of the same pipeline, with
            any config: those that ask for the same trajectories read them. qdiff never removes it. Distributed runs ignore it.
        run_key: a name for the inputs that ``run`` draws, by which an interrupted calibration is recognised, instead of by the code
            of ``run`` and all that it refers to. Needed if that code reads files or holds objects that cannot be compared; other
            inputs need another key.
    """

    prompts: Any = None
    class_labels: Sequence[int] | None = None
    run: Callable[..., Any] | None = None
    samples: int | None = None
    steps: int = 20
    guidance_scale: float | None = None
    scheduler: Any = None
    batch_size: int = 8
    timesteps: int | None = None
    hessian: bool = True
    noise_share: float = NOISE_SHARE
    mixed: bool = False
    damping: float = 0.01
    tuning: Tuning = field(default_factory=Tuning)
    seed: int = 0
    memory_limit: int = 2 << 30
    workspace: str | Path | None = None
    recordings: str | Path | None = None
    run_key: str | None = None

    def __post_init__(self) -> None:
        if isinstance(self.prompts, str | Path):
            object.__setattr__(self, "prompts", read_prompts(self.prompts))
        if isinstance(self.tuning, Mapping):
            object.__setattr__(self, "tuning", _make(Tuning, self.tuning, "tuning"))
        if sum(source is not None for source in (self.prompts, self.class_labels, self.run)) > 1:
            raise ConfigError("calibration: give prompts, class_labels or run, not several of them")
        for name, source in (("prompts", self.prompts), ("class_labels", self.class_labels)):
            if source is not None and not len(source):
                raise ConfigError(f"calibration: {name} is empty")
        for name in ("steps", "batch_size", "samples", "timesteps", "memory_limit"):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < 1):
                raise ConfigError(f"calibration: {name} must be a whole number above 0, got {value!r}")
        if self.run_key is not None and (self.run is None or not isinstance(self.run_key, str) or not self.run_key):
            raise ConfigError(f"calibration: run_key names what `run` draws and goes with it, as a text, got {self.run_key!r}")
        if self.recordings and self.run is not None:
            raise ConfigError("calibration: recordings cannot be kept for others where `run` draws the trajectories in its own way")
        if not 0 <= self.noise_share <= 1:
            raise ConfigError(f"calibration: noise_share must lie between 0 and 1, got {self.noise_share!r}")
        if not self.damping > 0:
            raise ConfigError(f"calibration: damping must be above 0, got {self.damping!r}")

    @property
    def count(self) -> int:
        """Number of trajectories."""
        given = self.prompts if self.prompts is not None else self.class_labels
        return self.samples or (len(given) if given is not None else 16)

    def settings(self) -> dict[str, Any]:
        """The settings that determine the result, JSON-able; prompts are counted, not quoted."""
        out = {f.name: getattr(self, f.name) for f in fields(self)} | {"tuning": asdict(self.tuning)}
        out = {k: v for k, v in out.items() if k not in ("workspace", "recordings", "memory_limit", "run", "scheduler")}
        out["prompts"] = None if self.prompts is None else len(self.prompts)
        out["class_labels"] = None if self.class_labels is None else list(self.class_labels)
        return out


def as_calibration(value: Any) -> Calibration:
    """A :class:`Calibration` from one, from a mapping of its fields, from prompts, class labels, or a file of prompts.

    Raises:
        ConfigError: ``value`` is none of these.
    """
    if isinstance(value, Calibration):
        return value
    if isinstance(value, Mapping):
        return _make(Calibration, value, "calibration")
    if isinstance(value, str | Path):
        return Calibration(prompts=value)
    if isinstance(value, Sequence) and len(value):
        if all(isinstance(item, str) for item in value):
            return Calibration(prompts=list(value))
        if all(isinstance(item, int) for item in value):
            return Calibration(class_labels=list(value))
    raise ConfigError(f"calibration must be prompts, class labels, a file of prompts or a Calibration, got {value!r}")


def read_prompts(path: str | Path) -> list[str]:
    """Prompts from a text file, one per line; blank lines are left out.

    Raises:
        ConfigError: the file cannot be read or holds no prompt.
    """
    try:
        lines = [line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read prompts from {path}: {error}") from error
    if not any(lines):
        raise ConfigError(f"{path} holds no prompt")
    return [line for line in lines if line]


def _make(cls: Any, values: Mapping[str, Any], name: str) -> Any:
    known = {f.name for f in fields(cls)}
    if unknown := sorted(set(values) - known):
        raise ConfigError(f"{name} has no setting {', '.join(unknown)}; it has {', '.join(sorted(known))}")
    return cls(**values)
