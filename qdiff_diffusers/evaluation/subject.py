"""The subject of an evaluation: a pipeline, its inputs, and a classifier of its images if there is one."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download

from ..calibration.fingerprints import folder_digest
from ..calibration.quantize import CALIBRATION_LOG
from ..calibration.settings import read_prompts
from ..checkpoint.components import DENOISERS, pipeline_components
from ..checkpoint.files import read_header, read_json, weight_files
from ..checkpoint.folders import INDEX
from ..checkpoint.results import RESULTS
from ..errors import CheckpointError, ConfigError
from ..formats import TensorInfo

PACKAGE = Path(__file__).parents[1]
# The models that come with the package. The first one's classifier scores the images of both.
BUNDLED = {"dit": PACKAGE / "demo_model", "unet": PACKAGE / "demo_unet"}
CLASSIFIER = BUNDLED["dit"] / "classifier"
BUNDLED_STEPS, BUNDLED_GUIDANCE = 20, 2.0


@dataclass(frozen=True)
class Subject:
    """A pipeline and its inputs.

    Attributes:
        name: the user's name for it.
        source: its folder or Hub name.
        components: names of its transformers or UNets.
        labels: classes or prompts that the images walk through in turn; ``None`` for a pipeline that takes neither.
        steps, guidance_scale: arguments of its call, ``None`` for its defaults.
        arguments: further arguments of its call.
        classifier: folder with a classifier of its images and features of real ones; ``None`` if there is none.
    """

    name: str
    source: str
    components: tuple[str, ...]
    labels: tuple[int, ...] | tuple[str, ...] | None
    steps: int | None = None
    guidance_scale: float | None = None
    arguments: dict[str, Any] = field(default_factory=dict)
    classifier: Path | None = None

    def labels_of(self, count: int) -> list[int] | list[str] | None:
        """One label per image."""
        labels: Any = self.labels
        return None if labels is None else [labels[i % len(labels)] for i in range(count)]

    @property
    def by_class(self) -> bool:
        return self.labels is not None and isinstance(self.labels[0], int)

    @cached_property
    def tensors(self) -> dict[str, TensorInfo]:
        """Tensors of the components in the files of a local folder, named ``component.tensor``; nothing for a Hub name."""
        out: dict[str, TensorInfo] = {}
        for component in self.components:
            folder = Path(self.source) / component
            for path in weight_files(folder) if folder.is_dir() else ():
                out |= {f"{component}.{name}": info for name, info in read_header(path).items()}
        return out

    @cached_property
    def stored_dtype(self) -> torch.dtype:
        """The 16-bit dtype that most of the stored weights have, bfloat16 if they have none."""
        found = [info.dtype for info in self.tensors.values() if info.dtype in (torch.float16, torch.bfloat16)]
        return max(set(found), key=found.count) if found else torch.bfloat16

    @cached_property
    def fingerprint(self) -> str:
        """Digest of all files of the pipeline's components; for a Hub name, the name and its present commit."""
        root = Path(self.source)
        if not root.is_dir():
            return f"{self.source}@{_commit(self.source)}"
        return model_digest(root)

    @cached_property
    def classifier_fingerprint(self) -> str | None:
        """Digest of the classifier; ``None`` if there is none."""
        return None if self.classifier is None else folder_digest(self.classifier)


def find_subject(
    model: str,
    *,
    prompts: Path | Sequence[str] | None = None,
    classes: Sequence[int] | None = None,
    steps: int | None = None,
    guidance_scale: float | None = None,
    arguments: dict[str, Any] | None = None,
) -> Subject:
    """The pipeline with a name, and its inputs.

    Args:
        model: "dit" or "unet" for one that comes with the package, else a pipeline's folder or Hub name.
        prompts: texts, or a file with one per line.
        classes: class labels. At most one of the two is given, and neither for a pipeline that draws from noise alone.

    Raises:
        ConfigError: there is no such pipeline, it has nothing to quantize, or its prompts or classes are missing.
    """
    if prompts is not None and classes is not None:
        raise ConfigError("prompts and classes were both given; a pipeline takes one of them")
    given: Any = read_prompts(prompts) if isinstance(prompts, Path) else prompts if prompts is not None else classes
    labels: Any = None if given is None else tuple(given)
    if labels == ():
        raise ConfigError("the list of prompts or classes is empty")
    bundled = BUNDLED.get(model)
    source = str(bundled or model)
    available = pipeline_components(source)
    if available is None:
        raise ConfigError(f"{model} is a single model, which draws nothing by itself; give the folder of its pipeline")
    components = tuple(name for name in available if name.startswith(DENOISERS))
    if not components:
        raise ConfigError(f"{model} has no {' or '.join(DENOISERS)}; it has {', '.join(available)}")
    if bundled:
        steps, guidance_scale = steps or BUNDLED_STEPS, BUNDLED_GUIDANCE if guidance_scale is None else guidance_scale
        labels = labels or tuple(range(len(class_names(bundled))))
    classifier = CLASSIFIER if bundled else _own_classifier(Path(source))
    return Subject(model, source, components, labels, steps, guidance_scale, arguments or {}, classifier)


def model_digest(root: Path) -> str:
    """A hash of the files that a pipeline or bare model is loaded from."""
    if (root / INDEX).is_file():
        return folder_digest(root, [INDEX, *read_json(root / INDEX)])  # its keys are the components, and settings
    found = [path.name for path in root.iterdir() if path.suffix in (".json", ".safetensors")]
    return folder_digest(root, sorted({*found} - {CALIBRATION_LOG, RESULTS}))


def class_names(folder: Path) -> list[str]:
    """The classes of a pipeline's folder, in the order of their labels; empty if it names none."""
    index = folder / "model_index.json"
    labels = json.loads(index.read_text()).get("id2label") if index.is_file() else None
    return [labels[str(i)] for i in range(len(labels))] if labels else []


def check_layer_names(subject: Subject, patterns: Iterable[str], where: str) -> None:
    """Refuse a part of a layer name that occurs in none of the subject's layers.

    Raises:
        ConfigError: names the pattern.
    """
    layers = [name.partition(".")[2].rpartition(".")[0] for name in subject.tensors if name.endswith(".weight")]
    for pattern in patterns:
        if layers and not any(pattern in name for name in layers):
            example = layers[len(layers) // 2]
            raise ConfigError(f"{where}: no layer of {subject.name} has {pattern!r} in its name; one is called {example}")


def _commit(name: str) -> str:
    """The commit of a pipeline on the Hub, or of its copy in the cache if the Hub cannot be reached.

    Raises:
        ConfigError: there is neither the one nor the other.
    """
    try:
        path = Path(hf_hub_download(name, "model_index.json"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{name} is no local folder, and no pipeline on the Hub that could be reached") from error
    return path.parent.name


def _own_classifier(root: Path) -> Path | None:
    """A folder ``classifier`` beside the model's own, as the bundled model has one."""
    folder = root / "classifier"
    try:
        return folder if folder.is_dir() and "head.weight" in read_header(folder / "model.safetensors") else None
    except (OSError, CheckpointError):
        return None
