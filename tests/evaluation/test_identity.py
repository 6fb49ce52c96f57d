"""What a run of ``qdiff eval`` made earlier is taken for a row only if everything that decides the row's pictures is the same."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from qdiff_diffusers import ConfigError, RTNConfig, quantize
from qdiff_diffusers.evaluation import evaluate, rows, subject
from qdiff_diffusers.evaluation.evaluate import Job, Settings, run_eval
from qdiff_diffusers.evaluation.rows import EvalRow, parse_rows
from qdiff_diffusers.evaluation.subject import Subject, find_subject

SMALL = Settings(images=2, paired=2, batch_size=2)
CONFIG = EvalRow("row", "config", {"method": "rtn", "bits": 4})


def key(folder: Path | str, row: EvalRow = CONFIG, settings: Settings = SMALL, **asked) -> str:
    return Job(row, find_subject(str(folder), **({"classes": [0, 1]} | asked)), settings, Path("unused")).store.key


def change_tensor(file: Path) -> None:
    """One number in the middle of a weight file, which keeps its size and its time."""
    times = os.stat(file)
    tensors = load_file(file)
    largest = max(tensors.values(), key=torch.Tensor.numel)
    largest.view(-1)[largest.numel() // 2] += 1
    save_file(tensors, file, {"format": "pt"})
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))


def change_setting(file: Path) -> None:
    data = json.loads(file.read_text())
    file.write_text(json.dumps(data | {"beta_end": 0.5}))


CHANGES = {
    "denoiser": lambda folder: change_tensor(folder / "transformer" / "diffusion_pytorch_model.safetensors"),
    "another component": lambda folder: change_tensor(folder / "vae" / "diffusion_pytorch_model.safetensors"),
    "scheduler": lambda folder: change_setting(folder / "scheduler" / "scheduler_config.json"),
    "index": lambda folder: change_setting(folder / "model_index.json"),
    "another file of a component": lambda folder: (folder / "scheduler" / "merges.txt").write_text("x"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_pipeline_that_changed_makes_its_rows_anew(change, by_class, tmp_path):
    folder = Path(shutil.copytree(by_class, tmp_path / "copy"))
    before = key(by_class)
    assert key(folder) == before  # wherever it lies
    (folder / "README.md").write_text("x")
    (folder / "vae" / ".cache").write_text("x")
    assert key(folder) == before
    CHANGES[change](folder)
    assert key(folder) != before


@pytest.mark.parametrize(
    "asked",
    [{"classes": [1, 0]}, {"steps": 3}, {"guidance_scale": 2.0}, {"arguments": {"height": 8}}],
    ids=lambda asked: next(iter(asked)),
)
def test_rows_are_made_anew_when_they_are_asked_otherwise(asked, by_class):
    assert key(by_class, **asked) != key(by_class)


@pytest.mark.parametrize("setting", [{"seed": 1}, {"dtype": "bfloat16"}, {"rest_dtype": "bfloat16"}, {"device": "cuda:0"}], ids=str)
def test_rows_are_made_anew_with_other_settings(setting, by_class):
    assert key(by_class, settings=replace(SMALL, **setting)) != key(by_class)
    assert key(by_class, settings=replace(SMALL, images=4)) == key(by_class)  # more of the same


def test_a_name_on_the_hub_stands_for_a_commit(monkeypatch):
    commits = iter(["aaa", "bbb", "aaa"])
    monkeypatch.setattr(subject, "hf_hub_download", lambda name, file: f"/cache/models--o--n/snapshots/{next(commits)}/{file}")
    found = [Subject("o/n", "o/n", ("transformer",), None).fingerprint for _ in range(3)]
    assert found[0] == found[2] != found[1]

    def gone(name, file):
        raise OSError

    monkeypatch.setattr(subject, "hf_hub_download", gone)
    with pytest.raises(ConfigError, match="o/n is no local folder"):
        _ = Subject("o/n", "o/n", ("transformer",), None).fingerprint


def test_prompts_of_a_calibration_count_as_they_stand_in_their_file(by_class, tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("a cat\na dog\n")
    row = replace(CONFIG, calibration={"prompts": str(file)})
    before = key(by_class, row)
    assert before == key(by_class, replace(CONFIG, calibration={"prompts": ["a cat", "a dog"], "recordings": "elsewhere"}))
    file.write_text("a cat\na cow\n")
    assert key(by_class, row) != before


def test_a_function_that_draws_counts_by_its_content(by_class):
    def row(scale, **more):
        return replace(CONFIG, calibration={"run": lambda pipe, samples, generators: scale, **more})

    assert key(by_class, row(1)) == key(by_class, row(1)) != key(by_class, row(2))
    with pytest.raises(ConfigError, match="cannot be told"):
        key(by_class, row(object()))
    assert key(by_class, row(object(), run_key="a")) != key(by_class, row(object(), run_key="b"))
    json.dumps(row(1).definition())


def test_a_quantized_folder_and_a_peer_count_by_what_they_are(by_class, tmp_path, monkeypatch):
    folder = quantize(by_class, RTNConfig(bits=4), tmp_path / "q", dtype=torch.float32)

    def of_folder() -> str:
        (row,) = parse_rows([str(folder)], find_subject(str(by_class), classes=[0]))
        return key(by_class, row)

    before = of_folder()
    assert of_folder() == before
    change_tensor(folder / "vae" / "diffusion_pytorch_model.safetensors")
    assert of_folder() != before
    peer = EvalRow("p", "peer", target=next(iter(rows.PEERS)))
    found = []
    for version in ("1.0", "1.0", "2.0"):
        monkeypatch.setattr(rows, "package_version", lambda name, version=version: version)
        found.append(key(by_class, peer))
    assert found[0] == found[1] and (found[0] != found[2]) == bool(rows.PEERS[peer.target].install)


def test_another_classifier_scores_again(by_class, tmp_path):
    classifiers = [tmp_path / "a", tmp_path / "b"]
    for i, folder in enumerate(classifiers):
        folder.mkdir()
        (folder / "model.safetensors").write_text(str(i))
    known = find_subject(str(by_class), classes=[0])
    jobs = [Job(CONFIG, replace(known, classifier=folder), SMALL, tmp_path) for folder in classifiers]
    assert jobs[0].score_key() != jobs[1].score_key() and jobs[0].store.key == jobs[1].store.key


def test_one_run_at_a_time_writes_to_a_folder_and_none_into_its_own_pipeline(by_class, tmp_path, monkeypatch):
    known = find_subject(str(by_class), classes=[0])
    others = parse_rows(["rtn:bits=4"], known)

    def again(*_, **__):
        with pytest.raises(ConfigError, match=r"another process is writing to .*out; wait until it is done"):
            run_eval(known, others, tmp_path / "out", SMALL)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(evaluate, "run_jobs", again)
        run_eval(known, others, tmp_path / "out", SMALL)
    assert not list(tmp_path.rglob(".*"))
    with pytest.raises(ConfigError, match="lies inside the source"):
        run_eval(known, others, by_class / "eval", SMALL)
