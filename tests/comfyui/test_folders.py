"""What the nodes notice of the files: a checkpoint that has been replaced is loaded anew, however it was done."""

from __future__ import annotations

import os
import shutil

import pytest
from comfyui import host


def replace(file, content):
    """Put another file in a file's place: of the same length and with the same time, as archives and rsync make them."""
    before = file.stat()
    new = file.with_name("new")
    new.write_text(content)
    os.utime(new, ns=(before.st_atime_ns, before.st_mtime_ns))
    new.rename(file)
    assert (file.stat().st_size, file.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)


def overwrite(file, content):
    """The same in place."""
    before = file.stat()
    file.write_text(content)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.fixture
def model(tmp_path):
    """A folder with two shards, one of them in a folder that is a link."""
    folder, elsewhere = tmp_path / "model", tmp_path / "elsewhere"
    folder.mkdir()
    elsewhere.mkdir()
    for file in (folder / "config.json", folder / "one.safetensors", elsewhere / "two.safetensors"):
        file.write_text("old")
    (folder / "linked").symlink_to(elsewhere)
    (elsewhere / "circle").symlink_to(folder)
    return folder


@pytest.mark.parametrize("change", [replace, overwrite])
@pytest.mark.parametrize("name", ["config.json", "one.safetensors", "linked/two.safetensors"])
def test_every_file_of_a_folder_counts(name, change, model):
    fingerprint = host.part("folders").fingerprint
    before = fingerprint(model)
    assert fingerprint(model) == before
    change(model / name, "new")
    assert fingerprint(model) != before


def test_a_file_and_the_config_beside_it_count(model):
    fingerprint, file = host.part("folders").fingerprint, model / "one.safetensors"
    seen = [fingerprint(file)]
    for change, changed in ((replace, file), (replace, model / "config.json")):
        change(changed, "new")
        seen.append(fingerprint(file))
    (model / "config.json").unlink()
    assert len({*seen, fingerprint(file)}) == 4


def test_shards_that_change_places_count(model):
    fingerprint = host.part("folders").fingerprint
    shutil.copytree(model / "linked", model / "three", symlinks=True)
    before = fingerprint(model)
    (model / "three").rename(model / "four")
    assert fingerprint(model) != before


def test_a_checkpoint_that_becomes_one_of_ours_is_offered(tmp_path, monkeypatch):
    import folder_paths

    config = tmp_path / "model" / "config.json"
    config.parent.mkdir()
    text = '{"quantization_config": {"quant_method": "%s"}}'
    config.write_text(text % "other")
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "diffusion_models", ([str(tmp_path)], {".safetensors"}))
    checkpoints = host.part("folders").checkpoints
    assert not checkpoints("diffusion_models")
    replace(config, text % "qdiff")
    assert list(checkpoints("diffusion_models")) == ["model"]


def test_names_that_other_nodes_make_are_looked_up_when_the_graph_runs(tmp_path, monkeypatch):
    """ComfyUI does not know them before, and leaves them out."""
    import folder_paths

    (tmp_path / "x.safetensors").write_text("old")
    for kind in ("qdiff", "diffusion_models", "text_encoders"):
        monkeypatch.setitem(folder_paths.folder_names_and_paths, kind, ([str(tmp_path)], {".safetensors"}))
    nodes = [host.part("nodes.load").LoadModel, host.part("nodes.clip").LoadCLIP, host.part("nodes.pipeline").LoadPipeline]
    assert all(node.validate_inputs() is True for node in [*nodes, host.part("nodes.quantize").SaveModel])
    before = nodes[0].fingerprint_inputs()
    replace(tmp_path / "x.safetensors", "new")
    assert nodes[0].fingerprint_inputs() != before
    with pytest.raises(FileNotFoundError, match="There is no quantized model 'y'"):
        nodes[0].execute("y")
