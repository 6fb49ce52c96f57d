"""Loading with nothing of ours imported: torch's entry point, and how little it may cost or break."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import textwrap
from importlib.metadata import entry_points
from pathlib import Path

import pytest
import tiny_models
import torch

import qdiff_autoload
from qdiff_diffusers import AQConfig, RTNConfig

transformers = pytest.importorskip("transformers")

ROOT = Path(qdiff_autoload.__file__).parent
TOKENS = [[0, 5, 9, 33, 60, 2, 7, 1]]


def python(code: str, *paths: Path, **environment: str) -> str:
    """What a fresh interpreter prints; it must end well."""
    variables = {k: v for k, v in os.environ.items() if not k.startswith(("QDIFF_", "TORCH_DEVICE_BACKEND"))}
    variables |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(map(str, paths))} | environment
    command = [sys.executable, "-c", textwrap.dedent(code)]
    elsewhere = tempfile.gettempdir()  # python -c looks for modules in its folder first
    done = subprocess.run(command, capture_output=True, text=True, env=variables, cwd=elsewhere, timeout=500, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> Path:
    """A quantized transformer and a quantized text encoder, and what they compute."""
    root = tmp_path_factory.mktemp("autoload")
    model = tiny_models.make("dit")
    model.save_pretrained(root / "dense")
    config = AQConfig(num_codebooks=1, codebook_bits=8, vector_size=4, codebook="shared", rotation=True, effort=0)
    type(model).from_pretrained(root / "dense", quantization_config=config).save_pretrained(root / "transformer")
    sizes = {"vocab_size": 64, "d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2}
    torch.manual_seed(0)
    transformers.T5EncoderModel(transformers.T5Config(**sizes)).save_pretrained(root / "dense_encoder")
    encoder = transformers.T5EncoderModel.from_pretrained(root / "dense_encoder", quantization_config=RTNConfig(bits=4))
    encoder.save_pretrained(root / "text_encoder")
    with torch.no_grad():
        torch.save(encoder(torch.tensor(TOKENS))[0], root / "encoded.pt")
    return root


def test_the_installed_package_has_the_entry_point():
    (entry,) = [e for e in entry_points(group="torch.backends") if e.name == "qdiff"]
    assert entry.load() is qdiff_autoload.autoload


def test_models_and_text_encoders_load_with_nothing_imported(checkpoints):
    out = python(
        f"""
        import sys, torch
        from transformers import T5EncoderModel
        from diffusers import DiTTransformer2DModel
        assert "qdiff_diffusers" not in sys.modules
        root = {str(checkpoints)!r}
        encoder = T5EncoderModel.from_pretrained(root + "/text_encoder")
        with torch.no_grad():
            output = encoder(torch.tensor({TOKENS}))[0]
        print(torch.equal(output, torch.load(root + "/encoded.pt")), "qdiff_diffusers" in sys.modules)
        model = DiTTransformer2DModel.from_pretrained(root + "/transformer")
        print(type(model.transformer_blocks[0].attn1.to_q).__name__)
        import qdiff_autoload
        print(any(isinstance(finder, qdiff_autoload._Finder) for finder in sys.meta_path))
        """
    )
    assert out.split() == ["True", "True", "QDiffLinear", "False"]


def test_a_pipeline_config_finds_the_backend_by_its_name():
    out = python(
        """
        import sys
        from diffusers import BitsAndBytesConfig, PipelineQuantizationConfig
        PipelineQuantizationConfig(quant_mapping={"transformer": BitsAndBytesConfig(load_in_8bit=True)})
        print("qdiff_diffusers" in sys.modules)
        config = PipelineQuantizationConfig(quant_backend="qdiff", quant_kwargs={"method": "fp", "bits": 4})
        print(type(config._resolve_quant_config(module_name="transformer")).__name__)
        """
    )
    assert out.split() == ["False", "FPConfig"]


def test_a_broken_package_is_an_error_and_never_a_silent_model(checkpoints, tmp_path):
    (tmp_path / "qdiff_diffusers.py").write_text("raise RuntimeError('disk on fire')")
    out = python(
        f"""
        import diffusers, transformers
        root = {str(checkpoints)!r}
        for cls, name in ((transformers.T5EncoderModel, "text_encoder"), (diffusers.DiTTransformer2DModel, "transformer")):
            try:
                cls.from_pretrained(root + "/" + name)
            except ImportError as error:
                print("disk on fire" in str(error), "qdiff_diffusers cannot be imported" in str(error))
        cls.from_pretrained(root + "/dense")
        """,
        tmp_path,
    )
    assert out.split() == ["True"] * 4


def test_nothing_is_downloaded_or_started_that_nobody_asked_for(checkpoints):
    """Quantizing, saving, describing, loading and running, with the Hub switched on."""
    out = python(
        f"""
        import sys, tempfile, torch, diffusers, transformers, qdiff_diffusers
        from qdiff_diffusers import SVDQuantConfig, inspect_checkpoint
        def hook(event, arguments):
            if event in ("socket.connect", "socket.getaddrinfo", "subprocess.Popen", "os.system", "os.exec", "os.posix_spawn"):
                print("not asked for:", event, arguments)
        sys.addaudithook(hook)
        root = {str(checkpoints)!r}
        for kind, name in ((diffusers.DiTTransformer2DModel, "dense"), (transformers.T5EncoderModel, "dense_encoder")):
            model = kind.from_pretrained(root + "/" + name, quantization_config=SVDQuantConfig(bits=4, rank=2, rounds=1))
            with tempfile.TemporaryDirectory() as folder:
                model.save_pretrained(folder)
                print(len(inspect_checkpoint(folder).layers) > 0)
                model = kind.from_pretrained(folder)
        with torch.no_grad():
            model(torch.tensor({TOKENS}))
        """,
        HF_HUB_OFFLINE="0",
    )
    assert out.split() == ["True", "True"], out


def test_with_an_old_transformers_a_quantized_text_encoder_is_refused(checkpoints, monkeypatch):
    """The package cannot load it there; transformers by itself would fill it with random numbers."""
    from transformers.quantizers import auto

    from qdiff_diffusers import ConfigError, register

    monkeypatch.setitem(auto.AUTO_QUANTIZATION_CONFIG_MAPPING, "qdiff", None)
    monkeypatch.setattr("qdiff_diffusers.integrations.registration.is_transformers_version", lambda *_: True)
    register()
    with pytest.raises(ConfigError, match=r"transformers 5\.0 or newer"):
        transformers.T5EncoderModel.from_pretrained(checkpoints / "text_encoder")


SABOTAGES = {
    "installing": "qdiff_autoload._install = fail",
    "the list of finders": "sys.meta_path = type('Sealed', (list,), {'insert': fail})(sys.meta_path)",
    "the loader": "qdiff_autoload._Finder.seen = fail; qdiff_autoload.autoload(); import diffusers.quantizers.auto",
    "the finder": "sys.meta_path.append(type('Broken', (), {'find_spec': fail})())",
    "the environment": "import os; os.environ = type('Sealed', (dict,), {'get': fail})(os.environ)",
    "a table that is already there": (
        "import types; sys.modules['diffusers.quantizers.auto'] = types.ModuleType('diffusers.quantizers.auto')"
    ),
}


def test_no_failure_of_ours_reaches_import_torch():
    """Sabotaged one by one through the very call that torch makes; the first also by importing torch itself."""
    out = python(
        """
        import sys
        import qdiff_autoload
        def fail(*_):
            raise RuntimeError("sabotage")
        qdiff_autoload._install = fail
        import torch
        print(torch.ones(2).sum().item())
        """
    )
    assert out.split() == ["2.0"]
    for sabotage in SABOTAGES.values():
        fail = "def fail(*_):\n    raise RuntimeError('sabotage')\n"
        assert python(f"import sys, qdiff_autoload\n{fail}{sabotage}\nqdiff_autoload.autoload()\nprint('fine')", ROOT) == "fine\n"


def fake_library(folder: Path, text: str) -> Path:
    (folder / "diffusers/quantizers").mkdir(parents=True)
    for package in ("diffusers", "diffusers/quantizers"):
        (folder / package / "__init__.py").touch()
    (folder / "diffusers/quantizers/auto.py").write_text(text)
    return folder


LOOK = """
import qdiff_autoload
qdiff_autoload.autoload()
qdiff_autoload.autoload()
import diffusers.quantizers.auto as auto
import sys, inspect
print(sum(isinstance(f, qdiff_autoload._Finder) for f in sys.meta_path), "tables" in inspect.getsource(auto))
print(sorted(getattr(auto, "AUTO_QUANTIZER_MAPPING", ["none"])), type(auto.__spec__.loader).__name__)
"""


@pytest.mark.parametrize(
    ("text", "printed"),
    [
        ("# tables\nAUTO_QUANTIZER_MAPPING, AUTO_QUANTIZATION_CONFIG_MAPPING = {}, {}", "['qdiff'] SourceFileLoader"),
        ("# tables with other names, in a diffusers yet to come", "['none'] SourceFileLoader"),
    ],
    ids=["tables", "no tables"],
)
def test_the_hook_leaves_a_library_as_it_would_be_but_for_one_entry(tmp_path, text, printed):
    assert python(LOOK, fake_library(tmp_path, text), ROOT).splitlines() == ["1 True", printed]


def test_looking_for_a_table_without_importing_it_loses_nothing(tmp_path):
    code = """
    import importlib.util
    import qdiff_autoload
    qdiff_autoload.autoload()
    importlib.util.find_spec("diffusers.quantizers.auto")
    import diffusers.quantizers.auto as auto
    print(sorted(auto.AUTO_QUANTIZER_MAPPING))
    """
    library = fake_library(tmp_path, "AUTO_QUANTIZER_MAPPING, AUTO_QUANTIZATION_CONFIG_MAPPING = {}, {}")
    assert python(code, library, ROOT) == "['qdiff']\n"


def test_an_error_inside_the_library_stays_its_own(tmp_path):
    code = """
    import qdiff_autoload
    qdiff_autoload.autoload()
    try:
        import diffusers.quantizers.auto
    except ZeroDivisionError:
        print("its own")
    """
    assert python(code, fake_library(tmp_path, "1 / 0"), ROOT) == "its own\n"


@pytest.mark.parametrize("value", ["0", "false", " Off "])
def test_an_environment_variable_switches_it_off(value, tmp_path):
    library = fake_library(tmp_path, "# tables\nAUTO_QUANTIZER_MAPPING, AUTO_QUANTIZATION_CONFIG_MAPPING = {}, {}")
    assert python(LOOK, library, ROOT, QDIFF_AUTOLOAD=value).splitlines() == ["0 True", "[] SourceFileLoader"]


def test_torchs_own_switch_works_too():
    code = "import sys, torch; print('qdiff_autoload' in sys.modules)"
    assert python(code, TORCH_DEVICE_BACKEND_AUTOLOAD="0") == "False\n"


def test_it_costs_import_torch_less_than_five_milliseconds():
    code = """
    import time
    start = time.process_time()  # not the clock on the wall: other tests may be running
    import qdiff_autoload
    qdiff_autoload.autoload()
    print(1000 * (time.process_time() - start))
    """
    assert min(float(python(code, ROOT)) for _ in range(5)) < 5
