"""Models load in several threads at once, quantized or not, and the process is afterwards what it was before."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import tempfile
import textwrap
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import diffusers
import pytest
import tiny_models
import torch
from torch import nn

from qdiff_diffusers import AQConfig, FPConfig, QDiffConfig, RTNConfig, SVDQuantConfig, VQConfig
from qdiff_diffusers.integrations import loading
from qdiff_diffusers.layers import set_tensor

transformers = pytest.importorskip("transformers")

THREADS = 8
METHODS: dict[str, Callable[[], QDiffConfig]] = {
    "aq": lambda: AQConfig(num_codebooks=1, codebook_bits=8, vector_size=4, codebook="shared", rotation=True, effort=0),
    "vq": lambda: VQConfig(codebook_bits=4, vector_size=2, restarts=1),
    "fp": lambda: FPConfig(weight_format="nvfp4"),
    "svdquant": lambda: SVDQuantConfig(bits=4, rank=2, rounds=1),
    "rtn": lambda: RTNConfig(bits=4),
}
SIZES = {"vocab_size": 64, "d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2}
Tensors = dict[str, torch.Tensor]


def tensors(model: nn.Module) -> Tensors:
    """Parameters and buffers, also those that are not saved."""
    return dict(model.named_parameters()) | dict(model.named_buffers())


def process_state() -> tuple[Any, ...]:
    """What loaders change for a while."""
    init = [getattr(nn.init, name) for name in dir(nn.init) if name.endswith("_")]
    tie = transformers.PreTrainedModel.tie_weights
    module = (nn.Module.register_parameter, nn.Module.register_buffer)
    return *module, torch.get_default_dtype(), torch.get_num_threads(), torch.linspace, tie, *init


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Dense and quantized tiny models and text encoders."""
    root = tmp_path_factory.mktemp("models")
    for name in ("dit", "sdxl_unet"):
        tiny_models.make(name).save_pretrained(root / name)
    torch.manual_seed(0)
    transformers.T5EncoderModel(transformers.T5Config(**SIZES)).save_pretrained(root / "t5")
    for method, config in METHODS.items():
        for name, kind in KINDS.items():
            kind.from_pretrained(root / name, quantization_config=config()).save_pretrained(root / f"{name}-{method}")
    pipe = diffusers.DiTPipeline(tiny_models.make("dit"), tiny_models.make("vae"), diffusers.DDIMScheduler())
    pipe.save_pretrained(root / "pipeline")
    return root


KINDS = {
    "dit": diffusers.DiTTransformer2DModel,
    "sdxl_unet": diffusers.UNet2DConditionModel,
    "t5": transformers.T5EncoderModel,
}


def loads(root: Path, method: str) -> dict[str, Callable[[], nn.Module]]:
    """Every way to load each model: dense in two dtypes, quantized on the fly, quantized before, as part of a pipeline."""

    def load(name: str, folder: str, **kwargs: Any) -> Callable[[], nn.Module]:
        return lambda: KINDS[name].from_pretrained(root / folder, **kwargs)

    def pipeline(**kwargs: Any) -> nn.Module:
        return diffusers.DiTPipeline.from_pretrained(root / "pipeline", **kwargs).transformer

    ways: dict[str, Callable[[], nn.Module]] = {}
    for name in KINDS:
        for dtype in (torch.float32, torch.bfloat16):
            ways[f"{name} {dtype}"] = load(name, name, torch_dtype=dtype)
        ways[f"{name} on the fly"] = load(name, name, quantization_config=METHODS[method](), torch_dtype=torch.bfloat16)
        ways[f"{name} quantized"] = load(name, f"{name}-{method}")
    ways["pipeline"] = lambda: pipeline(torch_dtype=torch.float16)
    ways["pipeline on the fly"] = lambda: pipeline(
        quantization_config=diffusers.PipelineQuantizationConfig(quant_mapping={"transformer": METHODS[method]()})
    )
    return ways


@pytest.fixture
def switching_often() -> Iterator[None]:
    """Threads take turns every tenth of a millisecond, so that what can go wrong does."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)
    yield
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("switching_often")
@pytest.mark.parametrize("method", METHODS)
def test_forty_loads_in_several_threads_give_what_they_give_alone(method: str, folders: Path) -> None:
    ways = loads(folders, method)
    alone = {name: tensors(way()) for name, way in ways.items()}
    before = process_state()
    jobs = random.Random(0).choices(list(ways), k=40)
    with ThreadPoolExecutor(THREADS) as pool:
        models = list(pool.map(lambda name: ways[name](), jobs))
    assert process_state() == before
    assert nn.Linear(2, 2).weight.device.type == "cpu"
    for name, model in zip(jobs, models, strict=True):
        found = tensors(model)
        assert found.keys() == alone[name].keys(), name
        for key, expected in alone[name].items():
            assert found[key].dtype == expected.dtype, (name, key)
            assert torch.equal(found[key].view(torch.uint8), expected.view(torch.uint8)), (name, key)


@pytest.mark.usefixtures("switching_often")
def test_lora_adapters_load_in_several_threads(folders: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    kind = diffusers.UNet2DConditionModel
    model = kind.from_pretrained(folders / "sdxl_unet-rtn")
    model.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    model.save_lora_adapter(tmp_path)
    expected = tiny_models.run(model, "sdxl_unet")
    before = process_state()

    def load(_: int) -> torch.Tensor:
        other = kind.from_pretrained(folders / "sdxl_unet-rtn")
        other.load_lora_adapter(tmp_path, prefix=None, use_safetensors=True)
        return tiny_models.run(other, "sdxl_unet")

    with ThreadPoolExecutor(THREADS) as pool:
        outputs = list(pool.map(load, range(16)))
    assert process_state() == before
    assert all(torch.allclose(output, expected, atol=1e-6) for output in outputs)


def test_modules_that_other_threads_make_meanwhile_are_not_on_the_meta_device() -> None:
    from accelerate import init_empty_weights

    with init_empty_weights(), ThreadPoolExecutor(1) as pool:
        assert nn.Linear(2, 2).weight.is_meta
        assert not pool.submit(nn.Linear, 2, 2).result().weight.is_meta
        with init_empty_weights():
            assert nn.Linear(2, 2).weight.is_meta
        assert nn.Linear(2, 2).weight.is_meta
    assert not nn.Linear(2, 2).weight.is_meta


def test_contexts_that_overlap_leave_nothing_behind() -> None:
    """The one that began first ends first."""
    from accelerate import init_empty_weights

    before = nn.Module.register_parameter
    inside, over = threading.Event(), threading.Event()

    def first() -> None:
        with init_empty_weights():
            inside.set()
            assert over.wait(300)

    thread = threading.Thread(target=first)
    thread.start()
    assert inside.wait(300)
    with init_empty_weights():
        over.set()
        thread.join()
        assert nn.Linear(2, 2).weight.is_meta
    assert nn.Module.register_parameter is before


def test_a_context_of_another_library_that_ends_later_does_no_harm() -> None:
    """It puts back what it found, which was ours for a while."""
    from accelerate import init_empty_weights

    before = nn.Module.register_parameter
    with init_empty_weights():
        theirs = nn.Module.register_parameter
    nn.Module.register_parameter = theirs  # type: ignore[method-assign]
    try:
        assert not nn.Linear(2, 2).weight.is_meta
        with init_empty_weights():
            assert nn.Linear(2, 2).weight.is_meta
        assert nn.Module.register_parameter is before
        assert not nn.Linear(2, 2).weight.is_meta
    finally:
        nn.Module.register_parameter = before  # type: ignore[method-assign]


def test_parameters_on_a_device_keep_class_gradient_and_attributes() -> None:
    from accelerate import init_on_device

    class Kind(nn.Parameter):
        pass

    with init_on_device(torch.device("meta")):
        module = nn.Module()
        module.frozen = Kind(torch.ones(2), requires_grad=False)
        module.nothing = None
        module.register_parameter("none", None)
        module.register_buffer("buffer", torch.ones(2))
    assert type(module.frozen) is Kind and module.frozen.is_meta and not module.frozen.requires_grad
    assert module.none is None and not module.buffer.is_meta
    with init_on_device(torch.device("meta"), include_buffers=True):
        assert nn.BatchNorm1d(2).running_mean.is_meta


def test_packed_tensors_arrive_where_register_parameter_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a process in which another library's threads have left it so."""

    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("not through this")

    module = nn.Linear(2, 2, bias=False)
    for name in ("register_parameter", "register_buffer", "__setattr__"):
        monkeypatch.setattr(nn.Module, name, fail)
    set_tensor(module, "codes", torch.ones(2, dtype=torch.int8))
    set_tensor(module, "scales", torch.ones(2))
    set_tensor(module, "codebooks", torch.ones(2), persistent=False)
    assert isinstance(module.codes, nn.Parameter) and not module.codes.requires_grad
    assert set(module.state_dict()) == {"weight", "codes", "scales"}


def test_a_process_that_threads_have_spoilt_before_is_mended(folders: Path) -> None:
    """``register_parameter`` was left replaced before qdiff was imported, by threads that loaded dense models."""
    code = f"""
        import threading
        import torch
        from accelerate import init_empty_weights
        inside, over = threading.Event(), threading.Event()
        def first():
            with init_empty_weights():
                inside.set()
                over.wait()
        thread = threading.Thread(target=first)
        thread.start()
        inside.wait()
        with init_empty_weights():
            over.set()
            thread.join()
        assert torch.nn.Linear(2, 2).weight.is_meta
        import qdiff_diffusers, diffusers, transformers
        for kind, name in ((diffusers.DiTTransformer2DModel, "dit"), (transformers.T5EncoderModel, "t5")):
            for method in {list(METHODS)!r}:
                model = kind.from_pretrained({str(folders)!r} + "/" + name + "-" + method)
                assert not any(tensor.is_meta for tensor in model.state_dict().values())
            kind.from_pretrained({str(folders)!r} + "/" + name, quantization_config=qdiff_diffusers.RTNConfig(bits=4))
        assert not torch.nn.Linear(2, 2).weight.is_meta
        print("mended")
    """
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment, cwd=tempfile.gettempdir(), timeout=500, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == ["mended"]


def test_reading_weights_does_not_wait_for_another_model_that_is_being_read(folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only construction is done one model at a time: two quantizers that wait for each other both go on."""
    together = threading.Barrier(2, timeout=300)
    from qdiff_diffusers.integrations.diffusers_quantizer import QDiffQuantizer

    original = QDiffQuantizer._process_model_after_weight_loading

    def wait(self: Any, model: nn.Module, **kwargs: Any) -> nn.Module:
        together.wait()
        return original(self, model, **kwargs)

    monkeypatch.setattr(QDiffQuantizer, "_process_model_after_weight_loading", wait)
    kwargs = {"quantization_config": RTNConfig(bits=4), "torch_dtype": torch.bfloat16}
    with ThreadPoolExecutor(2) as pool:
        models = list(pool.map(lambda _: KINDS["dit"].from_pretrained(folders / "dit", **kwargs), range(2)))
    assert len(models) == 2


@pytest.mark.parametrize("where", ["construction", "reading"])
def test_a_load_that_fails_frees_the_others_and_restores_the_default_dtype(
    where: str, folders: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = diffusers.DiTTransformer2DModel

    def fail(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError

    with monkeypatch.context() as patched:
        patched.setattr(kind, "from_config" if where == "construction" else "_fix_state_dict_keys_on_load", fail)
        with pytest.raises(ZeroDivisionError):
            kind.from_pretrained(folders / "dit", torch_dtype=torch.bfloat16)
    assert torch.get_default_dtype() == torch.float32
    assert loading._scopes.dtypes == []
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(kind.from_pretrained, folders / "dit").result(timeout=300).dtype == torch.float32


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_process_loads_although_another_thread_was_loading() -> None:
    inside = threading.Event()

    def hold() -> None:
        with loading._constructing:
            inside.set()
            threading.Event().wait(0.2)

    thread = threading.Thread(target=hold)
    thread.start()
    inside.wait()
    child = os.fork()
    if child == 0:
        os._exit(0 if loading._constructing.acquire(timeout=100) else 1)
    thread.join()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(loading._constructing.acquire, timeout=100).result()
        pool.submit(loading._constructing.release).result()
