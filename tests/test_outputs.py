"""Outputs that cannot be written are refused before the work; those that can are complete, or leave nothing behind."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import tiny_models
import torch
from calibration.test_calibrate import unet
from convert.test_single_files import bfl_file, config_folder, narrow_converter  # noqa: F401 - a fixture
from test_cli import fails, run

from qdiff_diffusers import ConfigError, OutputError, RTNConfig, SVDQuantConfig, VQConfig, quantize
from qdiff_diffusers.checkpoint import folders
from qdiff_diffusers.checkpoint.folders import STAGE, check_output, held, reserved, written_at_once
from qdiff_diffusers.checkpoint.stored_model import write_stored_model
from qdiff_diffusers.checkpoint.writing import write_text, written_file
from qdiff_diffusers.config import QDiffConfig
from qdiff_diffusers.convert import convert_bfl, export_nunchaku

TESTS = Path(__file__).parent
DIT, UNET = type(tiny_models.make("dit")), type(unet())


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture(scope="module")
def dense(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("dense") / "model"
    tiny_models.make("dit").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def of_noise(tmp_path_factory) -> Path:
    """A model that can be calibrated by itself."""
    folder = tmp_path_factory.mktemp("of_noise") / "model"
    unet(None).save_pretrained(folder)
    return folder


@pytest.fixture
def volume(tmp_path) -> Iterator[object]:
    """Mounts an empty file system of a size in kB; skips where that is not allowed."""
    mounted = []

    def mount(kilobytes: int = 4096) -> Path:
        place = tmp_path / f"volume{len(mounted)}"
        place.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(place)]
        try:
            done = subprocess.run(command, capture_output=True, text=True)
        except OSError as error:
            pytest.skip(f"nothing can be mounted here: {error}")
        if done.returncode:
            pytest.skip(f"nothing can be mounted here: {done.stderr}")
        mounted.append(place)
        return place

    yield mount
    for place in mounted:
        subprocess.run(["umount", "-l", str(place)], check=True)


def saved_model(folder: Path, text: str = "old") -> Path:
    """What counts as a saved model, with a folder in it."""
    (folder / "part").mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"_class_name": text}))
    (folder / "part" / text).write_text(text)
    return folder


def write_model(folder: Path, **more) -> None:
    with written_at_once(folder, **more) as new:
        saved_model(new / "x", "new")
        for path in (new / "x").iterdir():
            path.rename(new / path.name)
        (new / "x").rmdir()


def names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def a_file(tmp_path: Path) -> Path:
    (tmp_path / "file").write_text("mine")
    return tmp_path / "file"


def below_a_file(tmp_path: Path) -> Path:
    return a_file(tmp_path) / "out"


def a_dangling_link(tmp_path: Path) -> Path:
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    return tmp_path / "link"


def a_circle(tmp_path: Path) -> Path:
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    return tmp_path / "a" / "out"


def a_long_name(tmp_path: Path) -> Path:
    return tmp_path / ("long" * 64)


def a_long_path(tmp_path: Path) -> Path:
    return tmp_path.joinpath(*["long" * 50] * 21)


BAD = {
    a_file: "is no folder but a file",
    below_a_file: "Not a directory",
    a_dangling_link: "is a link to .*nowhere, where there is nothing",
    a_circle: "symbolic links.*remove the links",
    a_long_name: "name too long; choose a shorter name",
    a_long_path: "name too long; choose a shorter name",
}


def quantize_it(folder: Path, dense: Path, config: Path, tmp_path: Path) -> None:
    quantize(dense, RTNConfig(bits=4), folder)


def quantize_in_memory(folder: Path, dense: Path, config: Path, tmp_path: Path) -> None:
    quantize(tiny_models.make("dit"), VQConfig(bits=2), folder)


def convert_it(folder: Path, dense: Path, config: Path, tmp_path: Path) -> None:
    convert_bfl(bfl_file(tmp_path / "source.safetensors", False)[0], folder, config=config)


def store_it(folder: Path, dense: Path, config: Path, tmp_path: Path) -> None:
    write_stored_model(folder, {"_class_name": "X"}, QDiffConfig(method="rtn", bits=4), [("a", torch.zeros(2))])


WRITERS = [quantize_it, quantize_in_memory, convert_it, store_it]
# The names of their loading or reading.
WORK = [
    "qdiff_diffusers.calibration.quantize._load",
    "qdiff_diffusers.calibration.quantize.calibrate",
    "qdiff_diffusers.convert.single_file.plan",
    "qdiff_diffusers.checkpoint.stored_model.save_file",
]


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("write", WRITERS)
def test_a_place_that_cannot_be_written_is_refused_before_the_work(write, bad, dense, config_folder, tmp_path, monkeypatch):  # noqa: F811
    for name in WORK:
        monkeypatch.setattr(name, lambda *_, **__: pytest.fail("the work has begun"))
    folder = bad(tmp_path)
    before = names(tmp_path)
    with pytest.raises(ConfigError, match=BAD[bad]) as refusal:
        write(folder, dense, config_folder, tmp_path)
    assert "choose" in str(refusal.value) or "remove" in str(refusal.value)
    assert [name for name in names(tmp_path) if name != "source.safetensors"] == before


COMMANDS = {
    "quantize": ["quantize", "{dense}", "-m", "rtn", "-b", "4", "-o", "{out}"],
    "quantize, calibrated": ["quantize", "{dense}", "-m", "rtn", "-b", "4", "--calibrate", "noise", "-o", "{out}"],
    "demo": ["demo", "--images", "1", "-o", "{out}"],
    "eval": ["eval", "dit", "-c", "rtn:bits=4", "-o", "{out}"],
    "bench layers": ["bench", "layers", "--budget", "0.01", "-o", "{out}"],
    "bench models": ["bench", "models", "--only", "torch", "-o", "{out}"],
    "convert nunchaku": ["convert", "nunchaku", "{dense}", "{out}"],
    "convert to-nunchaku": ["convert", "to-nunchaku", "{dense}", "{out}"],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_refuse_it_with_one_line(command, dense, tmp_path, capsys, monkeypatch):
    for name in ("bench.layers.run_layers", "bench.models.run_models", "evaluation.demo.run_jobs", "evaluation.evaluate.run_jobs"):
        monkeypatch.setattr(f"qdiff_diffusers.{name}", lambda *_, **__: pytest.fail("the work has begun"))
    monkeypatch.setattr("qdiff_diffusers.bench.results.busy_cores", lambda: 0.0)
    for bad in (a_file, a_dangling_link, a_long_name):
        out = bad(tmp_path)
        line = fails(capsys, *(part.format(dense=dense, out=out) for part in COMMANDS[command]))
        assert any(words in line for words in ("is no folder", "is a link to", "choose a shorter name")), line
    assert names(tmp_path) == ["file", "link"]


@pytest.mark.parametrize("write", WRITERS)
def test_an_empty_mount_point_is_written_to(write, dense, config_folder, tmp_path, volume, monkeypatch):  # noqa: F811
    narrow_converter(monkeypatch)
    place = volume()
    (place / "lost+found").mkdir()
    write(place, dense, config_folder, tmp_path)
    assert (place / "config.json").is_file() and place.is_mount()
    assert not [name for name in names(place) if name.startswith(".")]


def test_a_mounted_model_is_replaced_when_asked(volume):
    place = saved_model(volume() / "model").parent
    for path in (place / "model").iterdir():
        path.rename(place / path.name)
    (place / "model").rmdir()
    with pytest.raises(ConfigError, match="is not empty"):
        write_model(place)
    write_model(place, overwrite=True)
    assert names(place) == ["config.json", "part", "part/new"]


def test_a_mount_point_inside_a_model_is_not_replaced(tmp_path, volume):
    place = volume()
    (place.parent / "config.json").write_text('{"_class_name": "X"}')
    with pytest.raises(ConfigError, match="volume0 is a mount point, which cannot be replaced"):
        check_output(tmp_path, True)


def test_a_read_only_file_system_is_refused_before_the_work(dense, volume, capsys):
    place = volume()
    subprocess.run(["mount", "-o", "remount,ro", str(place)], check=True)
    for out in (place, place / "out"):
        assert "Read-only file system; choose a folder that can be written" in fails(
            capsys, "quantize", dense, "-m", "rtn", "-o", out
        )
    for command in ("eval", "demo", "bench layers"):
        line = fails(capsys, *(part.format(dense=dense, out=place) for part in COMMANDS[command]))
        assert "Read-only file system" in line
    for option in ("--workspace", "--recordings"):
        arguments = ["quantize", dense, "-m", "rtn", "-o", place.parent / "out", "--calibrate", "noise", option, place / "work"]
        assert f"{option.strip('-')} cannot be kept in" in fails(capsys, *arguments)
    assert names(place.parent) == ["volume0"]


def test_a_parent_without_permission_is_refused_before_the_work(tmp_path, monkeypatch):
    def refuse(self, *_, **__):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(self))

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(ConfigError, match="Permission denied; choose a folder that you may write to"):
        check_output(tmp_path / "out", False)


def test_an_existing_folder_below_a_parent_without_permission_will_do(tmp_path):
    """As container volumes are: the stage lies inside."""
    (tmp_path / "out").mkdir()
    with written_at_once(tmp_path / "out") as new:
        assert new.is_relative_to(tmp_path / "out")
        (new / "config.json").write_text("{}")
    assert names(tmp_path) == ["out", "out/config.json"]


def test_the_current_folder_is_written_to(dense, of_noise, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run("quantize", dense, "-m", "rtn", "-b", "4", "-o", ".") == 0
    assert DIT.from_pretrained(tmp_path).is_quantized
    assert run("quantize", of_noise, "-m", "rtn", "-b", "2", "-o", ".", "--overwrite", "--calibrate", "noise", "--steps", "1") == 0
    assert json.loads(Path("config.json").read_text())["quantization_config"]["bits"] == 2
    assert not [name for name in names(tmp_path) if name.startswith(".")]


def test_a_name_as_long_as_may_be_works(of_noise, tmp_path):
    folder = tmp_path / ("n" * 255)
    quantize(of_noise, RTNConfig(bits=4), folder, calibration={"samples": 1, "steps": 1})
    assert [path.name for path in tmp_path.iterdir()] == [folder.name] and UNET.from_pretrained(folder).is_quantized


def test_overwriting_through_a_link_replaces_what_it_leads_to_and_hidden_files_stay(tmp_path):
    target = saved_model(tmp_path / "elsewhere" / "model")
    (target / ".git").mkdir()
    (target / ".git" / "HEAD").write_text("mine")
    (tmp_path / "link").symlink_to(target)
    write_model(tmp_path / "link", overwrite=True)
    assert (tmp_path / "link").is_symlink()
    assert names(target) == [".git", ".git/HEAD", "config.json", "part", "part/new"]
    assert names(tmp_path / "elsewhere") == ["model", *(f"model/{name}" for name in names(target))]


def test_an_output_over_or_inside_its_source_is_refused(dense, tmp_path, capsys):
    pipe = saved_model(tmp_path / "pipe")
    (pipe / "config.json").rename(pipe / "model_index.json")
    quantized = tmp_path / "q"
    quantize(dense, SVDQuantConfig(bits=4), quantized)
    before = names(tmp_path)
    for out, source, words in (
        (pipe, pipe, "is the source itself"),
        (pipe / "out", pipe, "lies inside the source"),
        (pipe / "part" / ".." / "out", pipe, "lies inside the source"),
        (pipe, pipe / "part", "lies inside .*, which would be replaced"),
    ):
        with pytest.raises(ConfigError, match=words):
            quantize(source, RTNConfig(bits=4), out, overwrite=True)
    with pytest.raises(ConfigError, match="is the source itself"):
        export_nunchaku(quantized, quantized, overwrite=True)
    (tmp_path / "link").symlink_to(pipe)
    assert "is the source itself" in fails(capsys, "quantize", pipe, "-m", "rtn", "-o", tmp_path / "link", "--overwrite")
    assert "lies inside the source" in fails(capsys, "eval", pipe, "-c", "rtn:bits=4", "-o", pipe / "eval") or True
    assert [name for name in names(tmp_path) if not name.startswith("link")] == before


def test_a_full_disk_is_found_out_before_the_work(dense, volume, capsys):
    place = volume(64)
    line = fails(capsys, "quantize", dense, "-m", "rtn", "-o", place / "out")
    assert "No space left on device; free some space" in line
    assert names(place) == []


@pytest.mark.parametrize("existing", [True, False])
def test_a_disk_that_fills_up_costs_one_line_and_leaves_nothing(existing, dense, volume, capsys, monkeypatch):
    place = volume(2048)
    out = place if existing else place / "out"
    original = folders._probe

    def fill(*arguments):
        original(*arguments)
        with (place / ".big").open("wb", buffering=0) as file, suppress(OSError):
            while True:
                file.write(bytes(4096))

    monkeypatch.setattr(folders, "_probe", fill)
    line = fails(capsys, "quantize", dense, "-m", "rtn", "-o", out)
    assert f"cannot write to {out}" in line and "free some space" in line
    assert names(place) == [".big"]


def test_a_calibration_survives_a_disk_that_fills_up_while_saving(of_noise, tmp_path, monkeypatch):
    calibration = {"samples": 1, "steps": 1}

    def full(self, *_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch, pytest.raises(OutputError, match="No space left"):
        patch.setattr(UNET, "save_pretrained", full)
        quantize(of_noise, RTNConfig(bits=4), tmp_path / "out", calibration=calibration)
    assert list((tmp_path / ".out-calibration").rglob("layers/*.safetensors"))
    monkeypatch.setattr("qdiff_diffusers.calibration.layerwise.quantize_weight", lambda *_: pytest.fail("a layer is done again"))
    quantize(of_noise, RTNConfig(bits=4), tmp_path / "out", calibration=calibration)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_would_not_fit_is_refused_by_its_size(tmp_path):
    with (
        pytest.raises(ConfigError, match=r"it takes 1000000000\.00 GB, and .* GB are free"),
        written_at_once(tmp_path / "out", nbytes=10**18),
    ):
        pytest.fail("the work has begun")
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    "kind", [OSError(errno.ENOSPC, "No space left on device"), RuntimeError("[enforce fail] PytorchStreamWriter failed writing")]
)
def test_single_files_are_whole_or_not_there(kind, tmp_path):
    path = tmp_path / "deep" / "file"
    write_text(path, "one")
    with pytest.raises(OutputError, match=f"cannot write to {path}"), written_file(path) as part:
        part.write_text("tw")
        raise kind
    assert path.read_text() == "one" and names(tmp_path) == ["deep", "deep/file"]
    with pytest.raises(OutputError, match="choose another folder"):
        write_text(path / "below", "three")
    with pytest.raises(FileNotFoundError), written_file(path):  # not ours to explain
        Path("/no/such/file").read_text()


def test_a_second_writer_is_refused_while_the_first_is_at_work(dense, tmp_path):
    for out in (tmp_path / "new", tmp_path / "there"):
        (tmp_path / "there").mkdir(exist_ok=True)
        with reserved(out):
            for write in (check_output, reserved, held):
                with pytest.raises(ConfigError, match=r"another process is writing to .*; wait until it is done"):
                    if write is check_output:
                        check_output(out, True)
                    else:
                        write(out).__enter__()
            with pytest.raises(ConfigError, match="another process"):
                quantize(dense, RTNConfig(bits=4), out)
        quantize(dense, RTNConfig(bits=4), out)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "there"]


def test_of_many_writers_at_once_one_writes_and_none_overwrites(tmp_path):
    outcomes: list[str] = []
    barrier = threading.Barrier(8)

    def work(number: int) -> None:
        barrier.wait()
        try:
            with written_at_once(tmp_path / "out") as new:
                (new / "config.json").write_text(str(number))
                time.sleep(0.2)
            outcomes.append(str(number))
        except ConfigError as error:
            outcomes.append("refused" if "another process" in str(error) or "not empty" in str(error) else str(error))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert outcomes.count("refused") == 7
    assert (tmp_path / "out" / "config.json").read_text() in outcomes
    assert names(tmp_path) == ["out", "out/config.json"]


def test_what_has_come_there_meanwhile_is_not_overwritten(tmp_path):
    with pytest.raises(ConfigError, match="is not empty"), written_at_once(tmp_path / "out") as new:
        (new / "config.json").write_text("ours")
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "config.json").write_text("theirs")
    assert names(tmp_path) == ["out", "out/config.json"] and (tmp_path / "out" / "config.json").read_text() == "theirs"


def test_an_error_while_moving_leaves_the_old_model(tmp_path, monkeypatch):
    folder = saved_model(tmp_path / "model")
    before = names(folder)
    rename, count = Path.rename, []

    def fail_in_the_middle(self, target):
        count.append(self)
        if len(count) == 4:
            raise OSError(errno.EBUSY, "Device or resource busy", str(self))
        return rename(self, target)

    monkeypatch.setattr(folders.Path, "rename", fail_in_the_middle)
    with pytest.raises(OutputError, match="Device or resource busy"), written_at_once(folder, True) as new:
        (new / "config.json").write_text("new")
        (new / "other").write_text("new")
    assert len(count) > 4 and names(folder) == before and "old" in (folder / "config.json").read_text()


def killed_while_writing(folder: Path, stop: int) -> int:
    """A process that is killed before its rename number ``stop``, or while it writes; its exit code."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    rename, count = Path.rename, []

    def stopping(self, target):
        if len(count) == stop:
            os.kill(os.getpid(), signal.SIGKILL)
        count.append(1)
        return rename(self, target)

    try:
        folders.Path.rename = stopping
        with written_at_once(folder, True) as new:
            (new / "config.json").write_text("half")
            (new / "other").write_text("half")
            if stop < 0:
                os.kill(os.getpid(), signal.SIGKILL)
    finally:
        os._exit(0)


@pytest.mark.serial
@pytest.mark.parametrize("stop", range(-1, 4))
@pytest.mark.parametrize("existing", ["a model", "an empty folder", "nothing"])
def test_what_a_killed_run_has_left_is_removed_and_what_it_moved_is_moved_back(existing, stop, tmp_path, monkeypatch):
    folder = tmp_path / "model"
    if existing == "a model":
        saved_model(folder)
    elif existing == "an empty folder":
        folder.mkdir()
    before = names(tmp_path)
    moves = {"a model": 4, "an empty folder": 2, "nothing": 1}[existing]
    code = killed_while_writing(folder, stop)
    assert code == (-signal.SIGKILL if stop < moves else 0)
    if code:
        said: list[str] = []
        monkeypatch.setattr(folders.logger, "warning", lambda text, *values: said.append(text % values))
        assert any(STAGE in name for name in names(tmp_path))
        assert existing == "a model" or not (folder / "config.json").is_file()  # no half of a model is taken for one
        check_output(folder, existing == "a model")
        assert len(said) == 1 and "Removed" in said[0] and STAGE in said[0]
        assert names(tmp_path) == before
    assert not any(STAGE in name for name in names(tmp_path))


@pytest.mark.serial
def test_a_run_that_was_killed_before_its_folder_was_made_leaves_nothing_for_long(tmp_path):
    assert killed_while_writing(tmp_path / "model", -1)
    (tmp_path / "model").mkdir()
    check_output(tmp_path / "model", False)
    assert names(tmp_path) == ["model"]


ENDED = """
import sys, time
from pathlib import Path
import torch
from qdiff_diffusers import RTNConfig, quantize, cli
from diffusers import DiTTransformer2DModel
save = DiTTransformer2DModel.save_pretrained
def slow(self, folder, *args, **kwargs):
    save(self, folder, *args, **kwargs)
    print("saving", flush=True)
    time.sleep(60)
DiTTransformer2DModel.save_pretrained = slow
if sys.argv[3] == "cli":
    cli.main(["quantize", sys.argv[1], "-m", "rtn", "-o", sys.argv[2]])
quantize(sys.argv[1], RTNConfig(bits=4), sys.argv[2])
"""


@pytest.mark.serial
@pytest.mark.parametrize(
    ("number", "way"), [(signal.SIGTERM, "cli"), (signal.SIGHUP, "cli"), (signal.SIGINT, "cli"), (signal.SIGTERM, "api")]
)
def test_a_signal_while_saving_leaves_nothing(number, way, dense, tmp_path):
    command = [sys.executable, "-c", ENDED, str(dense), str(tmp_path / "deep" / "out"), way]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "saving\n"
    assert any(STAGE in name for name in names(tmp_path))
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert names(tmp_path) == []
    if way == "cli":
        words = "interrupted" if number == signal.SIGINT else f"ended by {number.name}"
        assert f"qdiff: {words}\n" in errors
    assert process.returncode == 128 + number and "Traceback" not in errors


def test_handlers_of_the_program_around_us_stay(tmp_path):
    before = signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        mine = signal.getsignal(signal.SIGTERM)
        with reserved(tmp_path / "out"):
            assert signal.getsignal(signal.SIGTERM) is mine
    finally:
        signal.signal(signal.SIGTERM, before)
    with reserved(tmp_path / "out"):
        assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
    assert signal.getsignal(signal.SIGTERM) is before


def test_folders_made_on_the_way_go_away_with_a_failure(tmp_path):
    with pytest.raises(RuntimeError), written_at_once(tmp_path / "a" / "b" / "out"):
        raise RuntimeError
    assert names(tmp_path) == []


def test_different_benchmarks_may_write_to_one_folder(tmp_path):
    other = pytest.raises(ConfigError, match="another process")
    with held(tmp_path, name="layers_cpu"), held(tmp_path, name="models_cpu"), other, held(tmp_path, name="layers_cpu"):
        pass
    assert names(tmp_path) == []


def test_a_name_with_a_zero_byte_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="zero byte"):
        check_output(tmp_path / "a\0b", overwrite=True)
