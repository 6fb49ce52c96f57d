"""A checkpoint that is not what it says is refused as a whole, with one error that names what is wrong."""

from __future__ import annotations

import json
import shutil
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from safetensors.torch import load_file, save_file

from qdiff_diffusers import CheckpointError, ConfigError, FPConfig, QDiffError, RTNConfig, SVDQuantConfig, inspect_checkpoint

WEIGHTS = "diffusion_pytorch_model.safetensors"
LAYER = "transformer_blocks.0.attn1.to_q"
DIT = type(tiny_models.make("dit"))


@pytest.fixture(scope="module")
def dense(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("dense")
    tiny_models.make("dit").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def originals(tmp_path_factory, dense) -> dict[str, Path]:
    """A good checkpoint as a single file and in shards."""
    root = tmp_path_factory.mktemp("packed")
    model = DIT.from_pretrained(dense, quantization_config=SVDQuantConfig(bits=4, rank=2))
    model.save_pretrained(root / "single")
    model.save_pretrained(root / "sharded", max_shard_size="20KB")
    return {"single": root / "single", "sharded": root / "sharded"}


@pytest.fixture
def single(originals, tmp_path) -> Path:
    return Path(shutil.copytree(originals["single"], tmp_path / "checkpoint"))


@pytest.fixture
def sharded(originals, tmp_path) -> Path:
    return Path(shutil.copytree(originals["sharded"], tmp_path / "checkpoint"))


def edit_config(folder: Path, change: Callable[[dict], Any]) -> None:
    """Apply ``change`` to the quantization_config of config.json."""
    config = json.loads((folder / "config.json").read_text())
    change(config["quantization_config"])
    (folder / "config.json").write_text(json.dumps(config))


def edit_tensors(folder: Path, change: Callable[[dict], Any]) -> None:
    """Apply ``change`` to the tensors of a single-file checkpoint."""
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def assert_refused(folder: Path, named: str, error: type[Exception] | tuple = QDiffError) -> None:
    for given in ({}, {"dtype": torch.bfloat16}):
        with pytest.raises(error, match=named):
            DIT.from_pretrained(folder, **given)


def test_the_undamaged_checkpoints_load(originals):
    outputs = [tiny_models.run(DIT.from_pretrained(folder), "dit") for folder in originals.values()]
    assert torch.equal(*outputs)


@pytest.mark.parametrize("version", [0, 2, "1", None, 1.5])
def test_an_unknown_version_is_refused(single, version):
    edit_config(single, lambda c: c.update(format_version=version))
    assert_refused(single, f"version {version!r}")


def test_a_missing_version_is_refused(single):
    edit_config(single, lambda c: c.pop("format_version"))
    assert_refused(single, "version None")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda c: c.update(method="gptq"), "gptq"),
        (lambda c: c.pop("method"), "method None"),
        (lambda c: c.update(colour="red"), "colour"),
        (lambda c: c.update(bits=77), "77"),
        (lambda c: c.pop("specs"), "specs"),
        (lambda c: c["specs"].clear(), "specs|layer"),
        (lambda c: c["specs"][0]["format"].update(kind="ternary"), "ternary"),
        (lambda c: c["specs"][0]["format"].update(colour=1), "colour"),
        (lambda c: c["specs"][0].update(rank=-4), "-4"),
        (lambda c: c["specs"][0].update(activations="int3"), "int3"),
        (lambda c: c["layers"].update({LAYER: [99, [32, 32], 0.1]}), LAYER),
        (lambda c: c["layers"].update({LAYER: [0, [32, 32, 1], 0.1]}), LAYER),
        (lambda c: c["layers"].update({LAYER: "packed"}), LAYER),
    ],
    ids=range(13),
)
def test_an_unknown_or_malformed_description_is_refused(single, change, named):
    edit_config(single, change)
    assert_refused(single, named)
    with pytest.raises(QDiffError, match=named):
        inspect_checkpoint(single)


def test_a_spec_that_does_not_match_the_tensors_is_refused(single):
    edit_config(single, lambda c: c["specs"][0].update(rank=3))
    assert_refused(single, r"low_rank_down is float16 \[2, \d+\], its layer's spec says float16 \[3, \d+\]")


def test_a_group_size_that_does_not_match_the_tensors_is_refused(single):
    edit_config(single, lambda c: [s["format"].update(group_size=8) for s in c["specs"]])
    assert_refused(single, "scales is .* its layer's spec says")


@pytest.mark.parametrize("leaf", ["codes", "scales", "low_rank_down", "low_rank_up", "bias"])
def test_a_missing_tensor_is_refused_by_name(single, leaf):
    edit_tensors(single, lambda t: t.pop(f"{LAYER}.{leaf}"))
    assert_refused(single, f"lacks .*{LAYER}.{leaf}")


def test_a_missing_tensor_of_an_unpacked_layer_is_refused_by_name(single):
    edit_tensors(single, lambda t: t.pop("proj_out_2.weight"))
    assert_refused(single, r"lacks .*proj_out_2\.weight")


@pytest.mark.parametrize("leaf", ["codes", "scales", "low_rank_down"])
@pytest.mark.parametrize("ignore", [False, True], ids=["", "ignore_mismatched_sizes"])
def test_a_misshapen_tensor_is_refused_even_when_told_to_ignore_sizes(single, leaf, ignore):
    edit_tensors(single, lambda t: t.update({f"{LAYER}.{leaf}": t[f"{LAYER}.{leaf}"][:-1].clone()}))
    with pytest.raises(CheckpointError, match=rf"{LAYER}.{leaf} is .* spec says"):
        DIT.from_pretrained(single, ignore_mismatched_sizes=ignore)


def test_a_transposed_tensor_is_refused(single):
    edit_tensors(single, lambda t: t.update({f"{LAYER}.low_rank_up": t[f"{LAYER}.low_rank_up"].T.contiguous()}))
    assert_refused(single, f"{LAYER}.low_rank_up is")


@pytest.mark.parametrize("leaf", ["codes", "scales"])
def test_a_tensor_of_another_dtype_is_refused(single, leaf):
    edit_tensors(single, lambda t: t.update({f"{LAYER}.{leaf}": t[f"{LAYER}.{leaf}"].float()}))
    assert_refused(single, rf"{LAYER}.{leaf} is float32 .* spec says")


def test_a_misshapen_unpacked_tensor_is_refused(single):
    edit_tensors(single, lambda t: t.update({"proj_out_2.weight": t["proj_out_2.weight"][:-1].clone()}))
    assert_refused(single, r"proj_out_2\.weight is .* in the model")


@pytest.mark.parametrize("kept", [0, 4, 100, 0.5, -1], ids=["empty", "prefix", "header", "half", "last byte missing"])
def test_a_truncated_file_is_refused_by_name(single, kept):
    path = single / WEIGHTS
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * kept)] if isinstance(kept, float) else data[:kept])
    assert_refused(single, WEIGHTS)
    with pytest.raises(CheckpointError, match=WEIGHTS):
        inspect_checkpoint(single)


def test_a_file_with_something_after_its_end_is_refused(single):
    with (single / WEIGHTS).open("ab") as file:
        file.write(b"more")
    assert_refused(single, WEIGHTS)


def test_a_file_of_another_kind_is_refused(single):
    (single / WEIGHTS).write_bytes(b"\x80\x04 this is no safetensors file at all" * 10)
    assert_refused(single, WEIGHTS)


def test_a_truncated_shard_is_refused_by_name(sharded):
    shard = sorted(sharded.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-10])
    assert_refused(sharded, shard.name)


def test_a_missing_shard_is_refused_by_name(sharded):
    shard = sorted(sharded.glob("*.safetensors"))[1]
    shard.unlink()
    assert_refused(sharded, shard.name)


def test_a_tensor_missing_from_a_shard_is_refused_by_name(sharded):
    """The index still promises it; the file's own header does not."""
    shard = next(path for path in sorted(sharded.glob("*.safetensors")) if f"{LAYER}.codes" in load_file(path))
    tensors = load_file(shard)
    del tensors[f"{LAYER}.codes"]
    save_file(tensors, shard, metadata={"format": "pt"})
    assert_refused(sharded, f"{LAYER}.codes")


def test_an_unpacked_tensor_missing_from_a_shard_is_refused_by_name(sharded):
    shard = next(path for path in sorted(sharded.glob("*.safetensors")) if "proj_out_2.weight" in load_file(path))
    tensors = load_file(shard)
    del tensors["proj_out_2.weight"]
    save_file(tensors, shard, metadata={"format": "pt"})
    assert_refused(sharded, "proj_out_2.weight")


def test_a_layer_that_the_model_lacks_is_refused_by_name(single):
    edit_config(single, lambda c: c["layers"].update({"blocks.7.missing": c["layers"][LAYER]}))
    edit_tensors(
        single,
        lambda t: t.update(
            {k.replace(LAYER, "blocks.7.missing"): v.clone() for k, v in t.items() if k.startswith(LAYER)},
        ),
    )
    assert_refused(single, "packs layer blocks.7.missing, which DiTTransformer2DModel does not have")


def test_a_layer_of_another_kind_is_refused(single):
    norm = "transformer_blocks.0.norm1"
    edit_config(single, lambda c: c["layers"].update({norm: c["layers"][LAYER]}))
    edit_tensors(single, lambda t: t.update({k.replace(LAYER, norm): v.clone() for k, v in t.items() if k.startswith(LAYER)}))
    assert_refused(single, f"packs layer {norm}, but in the model it is a AdaLayerNormZero is not a plain")


def test_a_layer_of_another_shape_than_the_models_is_refused(single):
    config = json.loads((single / "config.json").read_text())
    config["attention_head_dim"] = 32
    (single / "config.json").write_text(json.dumps(config))
    assert_refused(single, r"layer transformer_blocks.* is \[.*\] in the checkpoint, \[.*\] in the model")


def test_a_layer_dropped_from_the_description_is_refused(single):
    edit_config(single, lambda c: c["layers"].pop(LAYER))
    assert_refused(single, f"{LAYER}.weight")


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c["layers"].update({LAYER: [0, [1 << 40, 1 << 40], 0.1]}),
        lambda c: [s.update(rank=4096) for s in c["specs"]],
        lambda c: c["specs"][0].update(
            format={"kind": "codebook", "num_codebooks": 8, "codebook_bits": 16, "vector_size": 64, "scale_dtype": "float32"}
        ),
    ],
    ids=["shape", "rank", "codebook"],
)
def test_huge_sizes_in_the_description_are_refused_without_allocating(single, change):
    edit_config(single, change)
    tracemalloc.start()
    assert_refused(single, r"is .* spec says|lacks tensor")
    assert tracemalloc.get_traced_memory()[1] < 50 << 20
    tracemalloc.stop()


def test_a_header_of_absurd_length_is_refused_without_reading_it(single):
    (single / WEIGHTS).write_bytes((1 << 60).to_bytes(8, "little") + b"{}")
    with pytest.raises(CheckpointError, match=WEIGHTS):
        inspect_checkpoint(single)
    assert_refused(single, WEIGHTS)


def test_a_folder_without_weights_or_config_is_refused(single, tmp_path):
    (single / WEIGHTS).unlink()
    assert_refused(single, WEIGHTS.removesuffix(".safetensors"), OSError)
    with pytest.raises(CheckpointError, match="no safetensors file"):
        inspect_checkpoint(single)
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="no qdiff checkpoint"):
        inspect_checkpoint(tmp_path / "empty")


def test_broken_json_is_refused_by_name(single):
    (single / "config.json").write_text("{ not json")
    assert_refused(single, "config.json", OSError)
    with pytest.raises(CheckpointError, match=r"config.json is not valid JSON"):
        inspect_checkpoint(single)


def test_a_checkpoint_of_pickles_is_refused(dense, tmp_path):
    model = DIT.from_pretrained(dense, quantization_config=RTNConfig(bits=4))
    model.save_config(tmp_path)
    torch.save(model.state_dict(), tmp_path / "diffusion_pytorch_model.bin")
    assert_refused(tmp_path, "is not a safetensors file", (CheckpointError, OSError))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")], ids=str)
def test_weights_that_are_not_finite_are_refused_while_quantizing(bad, tmp_path):
    model = tiny_models.make("dit")
    with torch.no_grad():
        model.get_submodule(LAYER).weight[3, 4] = bad
    model.save_pretrained(tmp_path)
    for config in (RTNConfig(bits=4), FPConfig(bits=4), SVDQuantConfig(bits=4)):
        with pytest.raises(QDiffError, match=rf"layer {LAYER} \[32, 32\]: the weight holds NaN or infinity"):
            DIT.from_pretrained(tmp_path, quantization_config=config)


def test_a_dense_checkpoint_without_a_layers_weight_is_refused_while_quantizing(dense, tmp_path):
    folder = Path(shutil.copytree(dense, tmp_path / "checkpoint"))
    edit_tensors(folder, lambda t: t.pop(f"{LAYER}.weight"))
    with pytest.raises(CheckpointError, match=f"no weight for {LAYER}"):
        DIT.from_pretrained(folder, quantization_config=RTNConfig(bits=4))


def test_a_dense_checkpoint_with_a_misshapen_weight_is_refused_while_quantizing(dense, tmp_path):
    folder = Path(shutil.copytree(dense, tmp_path / "checkpoint"))
    edit_tensors(folder, lambda t: t.update({f"{LAYER}.weight": t[f"{LAYER}.weight"][:, :-1].clone()}))
    for ignore in (False, True):
        with pytest.raises((ValueError, RuntimeError), match=LAYER):
            DIT.from_pretrained(folder, quantization_config=RTNConfig(bits=4), ignore_mismatched_sizes=ignore)


def test_disk_offload_is_refused_before_anything_is_read(dense, tmp_path):
    device_map = {"": "cpu", "transformer_blocks.1": "disk"}
    with pytest.raises(ConfigError, match="disk"):
        DIT.from_pretrained(dense, quantization_config=RTNConfig(bits=4), device_map=device_map, offload_folder=tmp_path)


def test_quantizing_without_low_memory_loading_is_refused(dense):
    with pytest.raises(ValueError, match="low_cpu_mem_usage"):
        DIT.from_pretrained(dense, quantization_config=RTNConfig(bits=4), low_cpu_mem_usage=False)


def test_a_config_given_for_a_quantized_checkpoint_does_not_change_it(single):
    with pytest.warns(UserWarning, match="already has a `quantization_config`"):
        model = DIT.from_pretrained(single, quantization_config=RTNConfig(bits=8))
    assert torch.equal(tiny_models.run(model, "dit"), tiny_models.run(DIT.from_pretrained(single), "dit"))


INDEX = "diffusion_pytorch_model.safetensors.index.json"


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda i: i["weight_map"].update(x="../outside.safetensors"), r"'\.\./outside\.safetensors'"),
        (lambda i: i["weight_map"].update(x="/etc/passwd"), "/etc/passwd"),
        (lambda i: i["weight_map"].update(x=["a"]), "weight_map"),
        (lambda i: i["weight_map"].update(x=7), "weight_map"),
        (lambda i: i.pop("weight_map"), "weight_map"),
        (lambda i: i.update(weight_map={}), "weight_map"),
        (lambda i: i.pop("metadata"), "metadata"),
        (lambda i: i.update(metadata=None), "metadata"),
    ],
    ids=["parent", "absolute", "list", "number", "no map", "empty map", "no metadata", "null metadata"],
)
def test_a_malformed_shard_index_is_refused_before_a_file_is_opened(sharded, change, named):
    index = json.loads((sharded / INDEX).read_text())
    change(index)
    (sharded / INDEX).write_text(json.dumps(index))
    assert_refused(sharded, named)
    with pytest.raises(CheckpointError, match=named):
        inspect_checkpoint(sharded)


def test_the_index_of_another_checkpoint_is_the_libraries_affair(dense, tmp_path):
    model = DIT.from_pretrained(dense)
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    index = json.loads((tmp_path / INDEX).read_text())
    del index["metadata"]
    (tmp_path / INDEX).write_text(json.dumps(index))
    with pytest.raises(KeyError):
        DIT.from_pretrained(tmp_path)


def lie(folder: Path, change: Callable[[dict], Any]) -> None:
    """Apply ``change`` to the header of a safetensors file, the data left as it is."""
    data = (folder / WEIGHTS).read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    (folder / WEIGHTS).write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


@pytest.mark.parametrize(
    "entry",
    [
        {"data_offsets": [0, 10**30]},
        {"data_offsets": ["0", "4"]},
        {"data_offsets": [-4, 0]},
        {"data_offsets": [0, 4, 8]},
        {"data_offsets": [8, 4]},
        {"shape": [1 << 62, 1 << 62]},
        {"shape": [-1, -1]},
        {"shape": 3},
        {"dtype": "F3"},
        {"dtype": ["F32"]},
    ],
    ids=str,
)
def test_a_header_that_lies_is_refused_by_name(single, entry):
    lie(single, lambda h: h[f"{LAYER}.bias"].update(entry))
    with pytest.raises(CheckpointError, match=r"malformed safetensors header|truncated or damaged"):
        inspect_checkpoint(single)
    assert_refused(single, WEIGHTS)


@pytest.mark.parametrize(
    "text", [b"[" * 200_000, b'{"a":' * 200_000, b"null", b"\xff" * 64], ids=["lists", "objects", "null", "bytes"]
)
def test_a_header_that_is_no_object_is_refused(single, text):
    (single / WEIGHTS).write_bytes(len(text).to_bytes(8, "little") + text)
    with pytest.raises(CheckpointError, match="malformed safetensors header"):
        inspect_checkpoint(single)


def test_an_endless_name_does_not_make_an_endless_message(single):
    edit_config(single, lambda c: c["layers"].update({"a" * 100_000: c["layers"][LAYER]}))
    with pytest.raises(CheckpointError) as raised:
        inspect_checkpoint(single)
    assert len(str(raised.value)) < 1100


@pytest.mark.parametrize("layout", ["single", "sharded"])
def test_variants_beside_a_checkpoint_are_not_counted_twice(layout, originals, tmp_path):
    folder, size = tmp_path / "checkpoint", inspect_checkpoint(originals[layout]).total_bytes
    shutil.copytree(originals[layout], folder)
    model = DIT.from_pretrained(folder)
    model.save_pretrained(folder, variant="fp16")
    model.save_pretrained(folder, variant="bf16", max_shard_size="20KB")
    assert inspect_checkpoint(folder).total_bytes == size


def test_a_checkpoint_that_is_only_there_as_a_variant_is_described(single, tmp_path):
    shards = {"max_shard_size": "20KB"}
    DIT.from_pretrained(single).save_pretrained(tmp_path / "only", variant="fp16", **shards)
    assert len(list((tmp_path / "only").glob("*.fp16-*"))) > 1
    assert inspect_checkpoint(tmp_path / "only").layers == inspect_checkpoint(single).layers
