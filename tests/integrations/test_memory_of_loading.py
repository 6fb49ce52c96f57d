"""A checkpoint that is quantized while it loads leaves memory, and who looks at its tensors sees no difference."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import tempfile
import textwrap
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file

from qdiff_diffusers import AQConfig, FPConfig, QDiffConfig, RTNConfig, SVDQuantConfig, VQConfig
from qdiff_diffusers.checkpoint import pages
from qdiff_diffusers.checkpoint.pages import release_pages
from qdiff_diffusers.errors import QDiffError
from qdiff_diffusers.integrations.diffusers_quantizer import QDiffQuantizer
from qdiff_diffusers.model import packing

on_linux = pytest.mark.skipif(not os.access("/proc/self/pagemap", os.R_OK), reason="pages can only be told apart on Linux")

METHODS: dict[str, Callable[[], QDiffConfig]] = {
    "aq": lambda: AQConfig(num_codebooks=1, codebook_bits=8, vector_size=4, codebook="shared", rotation=True, effort=0),
    "vq": lambda: VQConfig(codebook_bits=4, vector_size=2, restarts=1),
    "fp": lambda: FPConfig(bits=4),
    "svdquant": lambda: SVDQuantConfig(bits=4, rank=2, rounds=1),
    "rtn": lambda: RTNConfig(bits=4),
}


def resident(folder: Path) -> int:
    """Bytes of the files of a folder that are mapped and resident in this process."""
    total, counted = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        head = line.split(maxsplit=5)
        if "-" in head[0] and not head[0].endswith(":"):
            counted = len(head) > 5 and head[5].startswith(str(folder))
        elif counted and head[0] == "Rss:":
            total += int(head[1]) * 1024
    return total


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[int]:
    """How much of the files in ``tmp_path`` is resident whenever a layer begins to be quantized."""
    found: list[int] = []
    original = packing.quantize_named

    def quantize_named(*args: Any) -> Any:
        found.append(resident(tmp_path))
        return original(*args)

    monkeypatch.setattr(packing, "quantize_named", quantize_named)
    return found


def transformer() -> diffusers.DiTTransformer2DModel:
    torch.manual_seed(0)
    return diffusers.DiTTransformer2DModel(num_layers=2, num_attention_heads=8, attention_head_dim=64, num_embeds_ada_norm=1)


def quantize(folder: Path, config: QDiffConfig, dtype: torch.dtype = torch.float32) -> None:
    diffusers.DiTTransformer2DModel.from_pretrained(folder, quantization_config=config, torch_dtype=dtype)


def check(seen: list[int], folder: Path) -> None:
    """Linux maps the pages around each one that is touched: a sixth of these small files before the first layer is read."""
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    assert len(seen) > 10 and max(seen) < seen[0] + size / 8 < size / 2
    assert resident(folder) == 0


@on_linux
@pytest.mark.parametrize("method", METHODS)
def test_layers_that_have_been_quantized_leave_memory(method: str, seen: list[int], tmp_path: Path) -> None:
    transformer().save_pretrained(tmp_path)
    quantize(tmp_path, METHODS[method]())
    check(seen, tmp_path)
    assert seen[-1] < seen[0]


@on_linux
@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_so_do_those_that_are_cast_or_in_shards(dtype: torch.dtype, shards: int, seen: list[int], tmp_path: Path) -> None:
    transformer().save_pretrained(tmp_path, max_shard_size="15MB" if shards > 1 else "1GB")
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shards > 1)
    quantize(tmp_path, RTNConfig(bits=4), dtype)
    check(seen, tmp_path)


@on_linux
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", ["fp", "rtn"])
def test_so_do_those_of_text_encoders(method: str, dtype: torch.dtype, seen: list[int], tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 64, "d_model": 512, "d_kv": 64, "d_ff": 2048, "num_layers": 3, "num_heads": 8}
    torch.manual_seed(0)
    transformers.T5EncoderModel(transformers.T5Config(**sizes)).save_pretrained(tmp_path)
    transformers.T5EncoderModel.from_pretrained(tmp_path, quantization_config=METHODS[method](), dtype=dtype)
    check(seen, tmp_path)


@on_linux
def test_so_do_weights_that_are_stored_in_eight_bits(seen: list[int], tmp_path: Path) -> None:
    model = transformer()
    model.save_pretrained(tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    tensors = {name: t.to(torch.float8_e4m3fn) if t.ndim == 2 else t.clone() for name, t in load_file(file).items()}
    save_file(tensors, file, {"format": "pt"})
    quantize(tmp_path, RTNConfig(bits=4))
    check(seen, tmp_path)


def test_tensors_that_their_owner_changed_are_read_as_changed_and_stay_so(tmp_path: Path) -> None:
    """They are views of a mapped file, of which some pages have been written to."""
    model = transformer()
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "diffusion_pytorch_model.safetensors")
    name = "transformer_blocks.0.ff.net.0.proj.weight"
    tensors[name][100:200] *= 3
    model.state_dict()[name][100:200] *= 3
    quantizer = QDiffQuantizer(RTNConfig(bits=4), pre_quantized=False)
    quantizer.update_torch_dtype(torch.float32)
    quantizer.origin = {}
    found = diffusers.DiTTransformer2DModel.from_config(model.config)
    quantizer.preprocess_model(found, device_map=None)
    read = dict(tensors)
    for key in [f"{target}.weight" for target in quantizer.targets]:
        quantizer.create_quantized_param(found, read[key], key, torch.device("cpu"), read)
    for key, value in model.state_dict().items():
        assert torch.equal(tensors[key], value), key
    expected, _ = packing.quantize_named(name.removesuffix(".weight"), model.state_dict()[name], RTNConfig(bits=4))
    assert quantizer.quantization_config.layers[name.removesuffix(".weight")] == expected


@on_linux
def test_pages_that_are_released_are_read_again(tmp_path: Path) -> None:
    weight = torch.randn(1024, 1024)
    save_file({"before": weight + 1, "weight": weight, "after": weight - 1}, tmp_path / "a.safetensors")
    tensors = load_file(tmp_path / "a.safetensors")
    views = {name: tensor[3:700].T for name, tensor in tensors.items()}
    assert all(tensor.sum().isfinite() for tensor in tensors.values())
    before = resident(tmp_path)
    release_pages(tensors["weight"])
    assert resident(tmp_path) < before - weight.nbytes * 0.95
    assert torch.equal(views["weight"], weight[3:700].T)
    assert torch.equal(tensors["before"], weight + 1) and torch.equal(tensors["after"], weight - 1)


@on_linux
def test_a_pickle_that_is_mapped_is_released_too(tmp_path: Path) -> None:
    weight = torch.randn(1024, 1024)
    torch.save({"weight": weight}, tmp_path / "a.bin")
    tensor = torch.load(tmp_path / "a.bin", mmap=True)["weight"]
    assert tensor.sum().isfinite() and resident(tmp_path) > weight.nbytes * 0.95
    release_pages(tensor)
    assert resident(tmp_path) < weight.nbytes * 0.05
    assert torch.equal(tensor, weight)


def test_what_was_written_is_kept(tmp_path: Path) -> None:
    """A page that was written to is no longer the file's, and could not be read again."""
    weight = torch.randn(1024, 1024)
    save_file({"weight": weight}, tmp_path / "a.safetensors")
    tensor = load_file(tmp_path / "a.safetensors")["weight"]
    tensor[500] = 7
    release_pages(tensor)
    assert (tensor[500] == 7).all() and torch.equal(tensor[:500], weight[:500])


@pytest.mark.parametrize(
    "tensor",
    [
        torch.arange(1 << 20),
        torch.arange(1 << 20).view(1024, 1024).T,
        torch.zeros(1 << 20),
        torch.empty(0),
        torch.tensor(1.0),
        torch.empty(1 << 20, device="meta"),
        torch.eye(512).to_sparse(),
    ],
    ids=["numbers", "transposed", "zeros", "empty", "scalar", "meta", "sparse"],
)
def test_memory_that_is_no_files_is_left_alone(tensor: torch.Tensor) -> None:
    before = tensor.clone()
    release_pages(tensor)
    assert tensor.is_meta or torch.equal(tensor.to_dense(), before.to_dense())


def test_memory_that_processes_share_is_left_alone() -> None:
    tensor = torch.arange(1 << 20).share_memory_()
    release_pages(tensor)
    assert torch.equal(tensor, torch.arange(1 << 20))


@pytest.mark.parametrize("platform", ["darwin", "win32"])
def test_other_systems_release_nothing(platform: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    save_file({"weight": torch.ones(1 << 20)}, tmp_path / "a.safetensors")
    tensor = load_file(tmp_path / "a.safetensors")["weight"]
    with monkeypatch.context() as patched:
        patched.setattr(pages.sys, "platform", platform)
        pages._madvise.cache_clear()
        release_pages(tensor)
        assert pages._madvise() is None
    pages._madvise.cache_clear()
    assert (tensor == 1).all()


@on_linux
@pytest.mark.parametrize("method", ["rtn", "fp"])
def test_peak_memory_stays_near_the_size_of_the_file(method: str, tmp_path: Path) -> None:
    """Of a whole process, mapped pages included: 200 MB in one file, of which the largest layer is a sixth in float32."""
    code = f"""
        import json, sys, threading
        import diffusers, torch
        from qdiff_diffusers import FPConfig, RTNConfig
        config = {{"rtn": RTNConfig, "fp": FPConfig}}[{method!r}](bits=4)
        kind, folder = diffusers.DiTTransformer2DModel, {str(tmp_path)!r}
        small = dict(num_attention_heads=16, attention_head_dim=72, num_embeds_ada_norm=1)
        kind(num_layers=1, **small).to(torch.bfloat16).save_pretrained(folder + "/small")
        kind(num_layers=4, **small).to(torch.bfloat16).save_pretrained(folder + "/large")
        load = lambda name: kind.from_pretrained(folder + "/" + name, quantization_config=config, torch_dtype=torch.bfloat16)
        load("small")  # compiles, and imports
        def now():
            return int(open("/proc/self/statm").read().split()[1]) * 4096
        base, peak, over = now(), 0, threading.Event()
        def watch():
            global peak
            while not over.wait(0.002):
                peak = max(peak, now() - base)
        thread = threading.Thread(target=watch)
        thread.start()
        model = load("large")
        over.set()
        thread.join()
        print(json.dumps(peak))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        cwd=tempfile.gettempdir(),
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    size = (tmp_path / "large" / "diffusion_pytorch_model.safetensors").stat().st_size
    assert json.loads(done.stdout.splitlines()[-1]) < 1.1 * size


@pytest.mark.parametrize("threads", [1, 2, 4])
@pytest.mark.parametrize("method", METHODS)
def test_an_error_in_a_layer_names_it_and_leaves_nothing_behind(method: str, threads: int, tmp_path: Path) -> None:
    model = transformer()
    layer = "transformer_blocks.1.ff.net.2"
    model.get_submodule(layer).weight.data[400, 7] = torch.nan  # in one of several blocks of rows
    model.save_pretrained(tmp_path)
    before, running = torch.get_num_threads(), threading.active_count()
    torch.set_num_threads(threads)
    try:
        with pytest.raises(QDiffError, match=rf"^layer {layer} \[512, 2048\]: the weight holds NaN or infinity$"):
            quantize(tmp_path, METHODS[method]())
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    gc.collect()
    assert threading.active_count() == running
    assert not sys.platform.startswith("linux") or resident(tmp_path) == 0


@pytest.mark.parametrize("method", METHODS)
def test_models_are_the_same_to_the_bit_on_any_number_of_threads(method: str, tmp_path: Path) -> None:
    transformer().save_pretrained(tmp_path)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            kind = diffusers.DiTTransformer2DModel
            model = kind.from_pretrained(tmp_path, quantization_config=METHODS[method](), torch_dtype=torch.bfloat16)
            found.append(model.state_dict())
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        for name, tensor in found[0].items():
            assert torch.equal(tensor.view(torch.uint8), other[name].view(torch.uint8)), name
