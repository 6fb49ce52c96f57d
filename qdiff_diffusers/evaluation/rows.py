"""Rows of a table of qualities: a config, a quantized folder, or a peer."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import yaml

from ..calibration import Calibration, as_calibration
from ..calibration.fingerprints import digest
from ..calibration.settings import read_prompts
from ..checkpoint.inspect import inspect_checkpoint
from ..config import METHODS, QDiffConfig
from ..errors import ConfigError, QDiffError
from ..measuring.machine import package_version
from .peers import PEERS
from .subject import Subject, check_layer_names, model_digest

Kind = Literal["reference", "config", "folder", "peer"]
REFERENCE_NAME = "16-bit"
PLACES = ("workspace", "recordings", "memory_limit")  # settings of a calibration that do not change its result
COMMA = re.compile(r",(?![^\[{(]*[\]})])")  # not one inside brackets


@dataclass(frozen=True)
class EvalRow:
    """One row.

    Attributes:
        name: unique name of the row in the table.
        kind: "config" is quantized by the evaluation, "folder" is a quantized folder, "peer" is another package's quantizer.
        settings: settings of a config, including ``method``.
        target: folder, or name of the peer.
        calibration: mapping of the fields of :class:`Calibration`; see :func:`calibration_of`.
    """

    name: str
    kind: Kind
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    target: str = ""
    calibration: dict[str, Any] | None = None

    @property
    def method(self) -> str:
        """The row's method: a registered one, a peer's family, or "none" for the reference."""
        if self.kind == "config":
            return str(self.settings["method"])
        return {"reference": "none", "folder": "folder"}.get(self.kind) or PEERS[self.target].family

    def config(self) -> QDiffConfig:
        return QDiffConfig(**self.settings)

    def definition(self) -> dict[str, Any]:
        """Everything that decides this row's images, JSON-able; its name does not."""
        out: dict[str, Any] = {"kind": self.kind, "target": self.target}
        if self.kind == "config":
            out["settings"] = self.config().settings()
        if self.kind == "folder":
            out["config"] = self._files
        if self.kind == "peer" and (package := PEERS[self.target].install):
            out["version"] = package_version(package)
        return out | ({"calibration": _inputs(self.calibration)} if self.calibration is not None else {})

    @cached_property
    def _files(self) -> str:
        """Digest of the files in a folder that decide what it draws; cards and results are not among them."""
        return model_digest(Path(self.target))


REFERENCE = EvalRow(REFERENCE_NAME, "reference")


def parse_rows(entries: Iterable[str | dict[str, Any]], subject: Subject) -> list[EvalRow]:
    """Parse and check the rows that a user wrote.

    Args:
        entries: ``"aq:bits=2,activations=int8"``, the name of a peer, a quantized folder, or a mapping with ``method`` and its
            settings, ``peer`` or ``folder``, and if wanted ``name`` and ``calibration``.
        subject: the pipeline that the rows are for.

    Raises:
        ConfigError: names the first entry that cannot be used, and why.
    """
    rows = [_parse(entry) for entry in entries]
    if not rows:
        raise ConfigError("there is no row to evaluate; give at least one config, folder or peer")
    for row in rows:
        _check(row, subject)
    return _with_unique_names(rows)


def calibration_of(row: EvalRow, subject: Subject) -> Calibration | None:
    """The calibration of a row. By default it has the subject's prompts or labels, steps and guidance.

    Raises:
        ConfigError: a setting is unknown or impossible.
    """
    if row.calibration is None:
        return None
    if not isinstance(row.calibration, dict):
        raise ConfigError(f"calibration must be a mapping of settings, got {row.calibration!r}")
    asked: dict[str, Any] = {"steps": subject.steps, "guidance_scale": subject.guidance_scale}
    if not {"prompts", "class_labels", "run"} & set(row.calibration):
        asked["class_labels" if subject.by_class else "prompts"] = list(subject.labels) if subject.labels else None
    return as_calibration({key: value for key, value in asked.items() if value is not None} | row.calibration)


def read_row_file(path: Path) -> dict[str, Any]:
    """A YAML or JSON file: a list of rows, or a mapping with ``rows`` and settings of the command.

    Raises:
        ConfigError: the file cannot be read or is neither.
    """
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"the file of rows {path} cannot be read: {error}") from error
    if isinstance(data, list):
        data = {"rows": data}
    if not isinstance(data, dict) or not isinstance(data.get("rows"), list):
        raise ConfigError(f"{path} must hold a list of rows, or a mapping with such a list under 'rows'")
    return data


def _parse(entry: Any) -> EvalRow:
    if isinstance(entry, str):
        return _parse_text(entry)
    if not isinstance(entry, dict):
        raise ConfigError(f"a row is a text such as aq:bits=2 or a mapping, got {entry!r}")
    data = dict(entry)
    name, calibration = data.pop("name", None), data.pop("calibration", None)
    kinds = [key for key in ("method", "folder", "peer") if key in data]
    if len(kinds) != 1:
        raise ConfigError(f"a row needs one of method, folder and peer, got {entry!r}")
    if kinds == ["method"]:
        row = EvalRow(name or _config_name(data), "config", data, calibration=calibration)
    else:
        target = str(data.pop(kinds[0]))
        if data or calibration is not None:
            raise ConfigError(f"a row with a {kinds[0]} takes no {', '.join([*data, *(['calibration'] if calibration else [])])}")
        row = EvalRow(name or (Path(target).name if kinds == ["folder"] else target), kinds[0], target=target)  # type: ignore[arg-type]
    return row


def _parse_text(text: str) -> EvalRow:
    """``method:key=value,...``, a peer's name, or a folder."""
    head, _, tail = text.partition(":")
    if head in METHODS:
        settings: dict[str, Any] = {"method": head}
        for part in COMMA.split(tail) if tail else ():
            key, equals, value = part.partition("=")
            if not equals:
                raise ConfigError(f"row {text!r}: expected key=value, got {part!r}")
            settings[key.strip()] = yaml.safe_load(value)
        return EvalRow(_config_name(settings), "config", settings)
    if text in PEERS:
        return EvalRow(text, "peer", target=text)
    if Path(text).is_dir():
        return EvalRow(Path(text).name, "folder", target=text)
    raise ConfigError(f"row {text!r} is no method ({', '.join(METHODS)}), no peer ({', '.join(PEERS)}) and no folder that exists")


def _config_name(settings: dict[str, Any]) -> str:
    rest = {key: value for key, value in settings.items() if key != "method"}
    return f"{settings['method']} " + " ".join(f"{key}={value}" for key, value in rest.items()) if rest else settings["method"]


def _check(row: EvalRow, subject: Subject) -> None:
    if row.kind == "config":
        _check_config(row, subject)
    elif row.kind == "peer" and row.target not in PEERS:
        raise ConfigError(f"row {row.name}: unknown peer {row.target!r}; choose from {', '.join(PEERS)}")
    elif row.kind == "folder":
        inspect_checkpoint(row.target)


def _check_config(row: EvalRow, subject: Subject) -> None:
    try:
        config = row.config()
    except (QDiffError, TypeError) as error:
        raise ConfigError(f"row {row.name}: {_mend(row, error)}") from error
    check_layer_names(subject, [*(config.modules_to_not_convert or ()), *(config.overrides or ())], f"row {row.name}")
    try:
        calibration_of(row, subject)
    except ConfigError as error:
        raise ConfigError(f"row {row.name}: {error}") from error


def _mend(row: EvalRow, error: Exception) -> str:
    if isinstance(error, QDiffError):
        return str(error)
    method = row.settings["method"]
    known = {f.name for f in dataclasses.fields(METHODS[method])}
    foreign = sorted(set(row.settings) - known)
    return f"{', '.join(foreign)} does not go with method {method}; it takes {', '.join(sorted(known - {'method'}))}"


def _with_unique_names(rows: Sequence[EvalRow]) -> list[EvalRow]:
    taken = {REFERENCE_NAME: 1}
    out = []
    for row in rows:
        taken[row.name] = taken.get(row.name, 0) + 1
        out.append(row if taken[row.name] == 1 else dataclasses.replace(row, name=f"{row.name} ({taken[row.name]})"))
    return out


def _inputs(calibration: dict[str, Any]) -> dict[str, Any]:
    """The settings that decide a calibration's result, JSON-able: prompts as they stand in their file, ``run`` by its content."""
    out = {key: value for key, value in calibration.items() if key not in PLACES}
    if isinstance(out.get("prompts"), str | Path):
        out["prompts"] = read_prompts(out["prompts"])
    if out.get("run") is not None:
        out["run"] = out.get("run_key") or digest(out["run"], "run")
    return out
