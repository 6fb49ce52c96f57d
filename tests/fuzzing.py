"""Malformed checkpoints for the fuzz tests and benchmarks/fuzz.py: how they are made, where they knock, what may happen."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import logging
import os
import shutil
import struct
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tiny_models
import torch
from diffusers import DiTTransformer2DModel, FluxTransformer2DModel
from hypothesis import strategies as st
from safetensors import SafetensorError

from qdiff_diffusers import QDiffError, Quantization, SVDQuantConfig, VQConfig, inspect_checkpoint

INDEX = "diffusion_pytorch_model.safetensors.index.json"
ENCODER_INDEX = "model.safetensors.index.json"
DTYPES = [
    "F64",
    "F32",
    "F16",
    "BF16",
    "F8_E4M3",
    "F8_E5M2",
    "F8_E8M0",
    "F4",
    "I64",
    "I32",
    "I8",
    "U8",
    "BOOL",
    "C64",
    "",
    "f32",
    None,
    7,
]
HUGE = [-1, 0, 1, 7, 1 << 31, (1 << 31) - 1, 1 << 32, 1 << 62, (1 << 63) - 1, 1 << 64, 10**30, -(1 << 63)]
NAMES = ["", ".", "..", "../../etc/passwd", "/etc/passwd", "no.such.layer", "__class__", "a" * 5000, "\x00", "norm", "ünïcode", "0"]
PATHS = [
    "../x.safetensors",
    "/etc/passwd",
    "",
    ".",
    "no.safetensors",
    "a\x00b",
    "..\\x.safetensors",
    "config.json",
    "~/x",
    "x" * 300,
]

junk = st.recursive(
    st.none()
    | st.booleans()
    | st.sampled_from(HUGE)
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(NAMES)
    | st.sampled_from(["row", "float16", "e4m3", "codebook", "integer", "minifloat", "int4", "aq", "svdquant"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)


def places(tree: Any, path: tuple = ()) -> list[tuple]:
    """Paths of everything inside a JSON value."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return [p for key, value in items for p in ((*path, key), *places(value, (*path, key)))]


@st.composite
def mangled(draw: Any, tree: Any, values: Any = junk) -> Any:
    """A JSON object with one to three entries replaced, deleted, renamed or added."""
    tree = copy.deepcopy(tree)
    for _ in range(draw(st.integers(1, 3))):
        found = places(tree)
        if not found:
            break
        *path, last = draw(st.sampled_from(found))
        parent = tree
        for key in path:
            parent = parent[key]
        action = draw(st.sampled_from(["replace", "replace", "number", "delete", "rename", "add"]))
        if action == "replace":
            parent[last] = draw(values)
        elif action == "number":
            parent[last] = draw(st.sampled_from(HUGE))
        elif action == "delete" or isinstance(parent, list):
            del parent[last]
        elif action == "rename":
            parent[draw(st.sampled_from(NAMES) | st.text(max_size=8))] = parent.pop(last)
        else:
            parent[draw(st.text(max_size=8))] = draw(values)
    return tree


@st.composite
def mangled_file(draw: Any, data: bytes) -> bytes:
    """A safetensors file that is cut, lengthened, flipped, or whose header lies."""
    length = struct.unpack("<Q", data[:8])[0]
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    action = draw(st.sampled_from(["cut", "longer", "length", "flip", "entries", "entries", "raw", "swap"]))
    if action == "cut":
        return data[: draw(st.integers(0, len(data) - 1))]
    if action == "longer":
        return data + draw(st.binary(min_size=1, max_size=20))
    if action == "length":
        return struct.pack("<Q", draw(st.integers(0, (1 << 64) - 1) | st.integers(0, 2 * len(data)))) + data[8:]
    if action == "flip":
        at = draw(st.integers(0, 8 + length - 1))
        return data[:at] + bytes([data[at] ^ draw(st.integers(1, 255))]) + data[at + 1 :]
    if action == "raw":
        text = draw(st.sampled_from([b"[" * 200_000, b'{"a":' * 200_000, b"{}", b"null", b"\xff" * 64, b"9" * 9000]))
        return struct.pack("<Q", len(text)) + text + body
    if action == "swap":  # two tensors of a kind change places: the header is in order, its meaning is not
        a, b = (draw(st.sampled_from(sorted(header.keys() - {"__metadata__"}))) for _ in range(2))
        header[a], header[b] = header[b], header[a]
    else:
        dtypes = st.sampled_from(DTYPES)
        header = draw(mangled(header, junk | dtypes | st.lists(st.sampled_from(HUGE), max_size=3)))
    text = json.dumps(header).encode(errors="surrogatepass")
    return struct.pack("<Q", len(text)) + text + body


class Originals:
    """Good checkpoints to spoil, each in a folder of its own."""

    def __init__(self, root: Path) -> None:
        self.root = root
        tiny_models.make("dit").save_pretrained(root / "dense")
        overrides = {"to_k": VQConfig(codebook_bits=4, vector_size=2, restarts=1)}
        config = SVDQuantConfig(bits=4, rank=2, rounds=1, overrides=overrides)
        model = DiTTransformer2DModel.from_pretrained(root / "dense", quantization_config=config)
        model.save_pretrained(root / "single")
        model.save_pretrained(root / "sharded", max_shard_size="20KB")
        self.output = tiny_models.run(model, "dit")
        self.single = {p.name: p.read_bytes() for p in (root / "single").iterdir()}
        self.sharded = {p.name: p.read_bytes() for p in (root / "sharded").iterdir()}
        self.config = json.loads(self.single["config.json"])
        self.index = json.loads(self.sharded[INDEX])
        self.weights = next(name for name in self.single if name.endswith(".safetensors"))
        self.flux = self._flux()
        self.encoder, self.sharded_encoder = self._encoders()
        self.encoder_index = json.loads(self.sharded_encoder[ENCODER_INDEX])

    def _encoders(self) -> list[dict[str, bytes]]:
        from transformers import T5Config, T5EncoderModel

        sizes = {"vocab_size": 64, "d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 1, "num_heads": 2}
        torch.manual_seed(0)
        T5EncoderModel(T5Config(**sizes)).save_pretrained(self.root / "dense_encoder")
        overrides = {"SelfAttention.k": VQConfig(codebook_bits=4, vector_size=2, restarts=1)}
        config = SVDQuantConfig(bits=4, rank=2, rounds=1, overrides=overrides)
        model = T5EncoderModel.from_pretrained(self.root / "dense_encoder", quantization_config=config)
        model.save_pretrained(self.root / "encoder")
        model.save_pretrained(self.root / "sharded_encoder", max_shard_size="8KB")
        return [{p.name: p.read_bytes() for p in (self.root / name).iterdir()} for name in ("encoder", "sharded_encoder")]

    def _flux(self) -> dict[str, bytes]:
        tiny_models.make("flux").save_pretrained(self.root / "dense_flux")
        config = SVDQuantConfig(bits=4, rank=2, rounds=1)
        model = FluxTransformer2DModel.from_pretrained(self.root / "dense_flux", quantization_config=config)
        model.save_pretrained(self.root / "flux")
        return {p.name: p.read_bytes() for p in (self.root / "flux").iterdir()}

    def write(self, files: dict[str, bytes]) -> Path:
        folder = self.root / "spoiled"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        for name, data in files.items():
            (folder / name).write_bytes(data)
        return folder

    def good(self, family: str) -> dict[str, bytes]:
        """A checkpoint of a family before it is spoiled."""
        return self.flux if family == "single file" else self.encoder if "encoder" in family else self.single

    # What can be spoiled: a strategy of files for each family

    def _with_config(self, files: dict[str, bytes], quantization: dict[str, Any]) -> dict[str, bytes]:
        config = json.loads(files["config.json"])
        # Anything without our name in it is another program's checkpoint.
        config["quantization_config"] = {**quantization, "quant_method": "qdiff"}
        return files | {"config.json": json.dumps(config).encode(errors="surrogatepass")}

    def families(self) -> dict[str, tuple[st.SearchStrategy[dict[str, bytes]], tuple[str, ...]]]:
        """``{name: (spoiled files, doors)}``."""
        ours = self.config["quantization_config"]
        encoder = json.loads(self.encoder["config.json"])["quantization_config"]
        weights = "model.safetensors"
        index = mangled(self.index, junk | st.sampled_from(PATHS))
        return {
            "config": (mangled(ours).map(lambda c: self._with_config(self.single, c)), ("inspect", "diffusers")),
            "header": (
                mangled_file(self.single[self.weights]).map(lambda f: self.single | {self.weights: f}),
                ("inspect", "diffusers"),
            ),
            "index": (index.map(lambda i: self.sharded | {INDEX: json.dumps(i).encode()}), ("inspect", "diffusers")),
            "single file": (
                mangled_file(self.flux[self.weights]).map(lambda f: self.flux | {self.weights: f}),
                ("inspect", "from_single_file"),
            ),
            "encoder index": (
                mangled(self.encoder_index, junk | st.sampled_from(PATHS)).map(
                    lambda i: self.sharded_encoder | {ENCODER_INDEX: json.dumps(i).encode()}
                ),
                ("inspect", "transformers"),
            ),
            "encoder config": (mangled(encoder).map(lambda c: self._with_config(self.encoder, c)), ("inspect", "transformers")),
            "encoder header": (
                mangled_file(self.encoder[weights]).map(lambda f: self.encoder | {weights: f}),
                ("inspect", "transformers"),
            ),
        }


def load_diffusers(folder: Path) -> Any:
    return DiTTransformer2DModel.from_pretrained(folder)


def load_transformers(folder: Path) -> Any:
    from transformers import T5EncoderModel

    return T5EncoderModel.from_pretrained(folder)


def load_single_file(folder: Path) -> Any:
    config = Quantization.from_dict(json.loads((folder / "config.json").read_text())["quantization_config"])
    (file,) = folder.glob("*.safetensors")
    return FluxTransformer2DModel.from_single_file(str(file), config=str(folder), quantization_config=config)


DOORS: dict[str, Callable[[Path], Any]] = {
    "inspect": inspect_checkpoint,
    "diffusers": load_diffusers,
    "transformers": load_transformers,
    "from_single_file": load_single_file,
}
OUTCOMES = ("loaded", "refused by us", "refused by the library")
FORBIDDEN = ("os.system", "os.exec", "os.posix_spawn", "subprocess.Popen", "socket.connect", "pickle.find_class")
seen: list[str] = []
watching = False


def _audit(event: str, arguments: tuple) -> None:
    if watching and event in FORBIDDEN and not _of_numba():
        seen.append(event)


def _of_numba() -> bool:
    """Compiled CPU kernels come from numba's own cache, which is pickled, the first time that one decodes a weight."""
    frame = sys._getframe(2)
    while frame is not None:
        if f"{os.sep}numba{os.sep}" in frame.f_code.co_filename:
            return True
        frame = frame.f_back
    return False


sys.addaudithook(_audit)


def knock(door: str, folder: Path) -> str:
    """One of ``OUTCOMES``; any exception but those that we or the libraries document passes through.

    A checkpoint that loads is a good one: nothing is left unread. Nothing is ever executed, unpickled or fetched.
    """
    global watching
    seen.clear()
    watching = True
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            found = DOORS[door](folder)
    except QDiffError as error:
        assert len(str(error)) < 2000, "an error message of more than a screen"
        return "refused by us"
    except (OSError, SafetensorError, ValueError, RuntimeError) as error:
        if not _documented(error):
            raise
        return "refused by the library"
    finally:
        watching = False
        assert not seen, f"a checkpoint led to {seen}"
    if door != "inspect":
        assert not [name for name, tensor in found.state_dict().items() if tensor.is_meta], "a tensor was left unread"
    return "loaded"


def _documented(error: Exception) -> bool:
    """What the libraries say of files that they read before we see them, and of misshapen tensors outside packed layers."""
    if isinstance(error, OSError | SafetensorError):
        return True
    return "expected shape" in str(error) or "ignore_mismatched_sizes" in str(error)


@contextlib.contextmanager
def quiet_libraries() -> Any:
    """Without the loaders' own remarks on what is wrong."""
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)
