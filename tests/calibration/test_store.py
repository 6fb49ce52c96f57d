"""The store of recorded calls, and what calibration is given."""

from __future__ import annotations

import pytest
import torch

from qdiff_diffusers import Calibration, CalibrationError, ConfigError, Tuning
from qdiff_diffusers.calibration import as_calibration
from qdiff_diffusers.calibration.store import Store

ENTRY = {"inputs": {"x": torch.arange(6.0).view(2, 3), "extra": [torch.ones(2), (None, True, 1.5, "text")]}, "step": 3}


def assert_same(a, b):
    assert type(a) is type(b)
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b) and a.dtype == b.dtype
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, list | tuple):
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    else:
        assert a == b


@pytest.mark.parametrize("limit", [0, 40, 1 << 20])
def test_entries_come_back_from_memory_and_from_disk(limit, tmp_path):
    store = Store(tmp_path / "calls", limit)
    for _ in range(3):
        store.append(ENTRY)
    assert len(store) == 3
    for entry in store:
        assert_same(entry, ENTRY)
    files = len(list((tmp_path / "calls").glob("*"))) if (tmp_path / "calls").exists() else 0
    assert files == {0: 3, 40: 2, 1 << 20: 0}[limit]  # an entry is 32 bytes


def test_what_one_run_kept_another_finds_up_to_the_first_damaged_entry(tmp_path):
    store = Store(tmp_path, 1 << 20, keep=True)
    for _ in range(3):
        store.append(ENTRY)
    again = Store(tmp_path, 1 << 20, keep=True)
    assert again.adopt() == 3
    assert_same(again[2], ENTRY)
    store.path(1).write_bytes(store.path(1).read_bytes()[:50])
    assert Store(tmp_path, 1 << 20, keep=True).adopt() == 1


def test_a_full_disk_is_an_error_that_leaves_no_half_file(tmp_path, monkeypatch):
    def no_space(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("qdiff_diffusers.calibration.store.save_file", no_space)
    store = Store(tmp_path, 0)
    with pytest.raises(CalibrationError, match="No space left"):
        store.append(ENTRY)
    assert list(tmp_path.iterdir()) == []
    assert len(store) == 0


def test_what_cannot_be_recorded_is_named():
    with pytest.raises(CalibrationError, match="object"):
        Store("unused", 1 << 20).append({"inputs": object()})


def test_what_users_may_give_as_calibration(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("a cat\n\n a dog \n")
    assert as_calibration(file).prompts == ["a cat", "a dog"]
    assert as_calibration(["a cat"]).prompts == ["a cat"]
    assert as_calibration([1, 2]).class_labels == [1, 2]
    assert as_calibration({"samples": 3, "tuning": {"steps": 5}}).tuning.steps == 5
    assert as_calibration({"class_labels": [1, 2]}).count == 2


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (7, "must be prompts"),
        ([], "must be prompts"),
        ({"nothing": 1}, "no setting nothing"),
        ({"tuning": {"speed": 1}}, "no setting speed"),
        ({"prompts": []}, "prompts is empty"),
        ({"prompts": ["a"], "class_labels": [1]}, "not several"),
        ({"steps": 0}, "steps must be"),
        ({"samples": 2.5}, "samples must be"),
        ({"damping": 0}, "damping must be"),
        ({"noise_share": 1.5}, "noise_share must lie between 0 and 1, got 1.5"),
        ({"tuning": {"objective": "layer"}}, "objective must be one of model, blocks"),
        ({"tuning": {"assignments": "best"}}, "assignments must be one of"),
        ({"tuning": {"fraction": 2}}, "fraction must lie"),
        ({"prompts": "no/such/file"}, "cannot read prompts"),
    ],
)
def test_bad_calibrations_are_refused_before_work_starts(value, message):
    with pytest.raises(ConfigError, match=message):
        as_calibration(value)


def test_an_empty_file_of_prompts_is_refused(tmp_path):
    (tmp_path / "empty.txt").write_text("\n \n")
    with pytest.raises(ConfigError, match="holds no prompt"):
        as_calibration(tmp_path / "empty.txt")


def test_settings_name_what_determines_the_result():
    a = Calibration(class_labels=[1], tuning=Tuning(steps=3), workspace="here")
    assert "workspace" not in a.settings()
    assert a.settings() != Calibration(class_labels=[1]).settings()
