"""The table of patches: every target exists in the supported versions, and one that is gone switches off one feature only."""

from __future__ import annotations

import importlib
import importlib.util
import json
import logging
import os
import subprocess
import sys
import tempfile
import textwrap
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import qdiff_diffusers
from qdiff_diffusers import QDiffError
from qdiff_diffusers.integrations import patches
from qdiff_diffusers.integrations.patches import MARKER, Entry, Patch, Setup, State
from qdiff_diffusers.integrations.table import TABLE

IMPORTED = ("_skip_init_on_device", "init_on_device", "load_state_dict")  # by other modules of its library, which need it


def can_be_removed(row: Patch) -> bool:
    """Not what the class has from another one too, which is wrapped then, nor a class or a module as a whole."""
    if isinstance(row, Setup) or not row.is_needed():
        return False
    owner, _, name = row.path.rpartition(".")
    kind = getattr(importlib.import_module(row.module), owner, None)
    return not (isinstance(kind, type) and any(name in vars(base) for base in kind.__mro__[1:]))


FORKS = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


@pytest.mark.parametrize("row", TABLE, ids=lambda row: row.target)
def test_all_targets_exist_in_the_installed_versions(row: Patch) -> None:
    if importlib.util.find_spec(row.library) is None:
        pytest.skip(f"{row.library} is not installed")
    if not row.is_needed():
        assert patches.state(row) == State("not needed")
        return
    importlib.import_module(row.module)
    assert patches.state(row) == State("active")


@pytest.mark.parametrize("row", TABLE, ids=lambda row: row.target)
def test_every_row_says_what_it_is_for_and_where_its_body_is(row: Patch) -> None:
    assert row.feature
    assert row.body.startswith("qdiff_diffusers.")
    if importlib.util.find_spec(row.library) is not None:
        importlib.import_module(row.module)
        assert callable(patches.load(row.body))


def in_fresh_process(code: str) -> Any:
    """What a program prints last, as JSON."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        cwd=tempfile.gettempdir(),
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


# A program that runs a function in forked copies of itself, after the imports that take the time.
PRELUDE = """
import importlib, inspect, json, logging, os, sys, traceback
from fnmatch import fnmatchcase
import torch, diffusers, transformers, peft, accelerate

class Told(logging.Handler):
    def __init__(self):
        super().__init__()
        self.messages = []
    def emit(self, record):
        self.messages.append(record.getMessage())

def remove(module, path):
    first, _, last = path.rpartition(".")
    owners = [v for n, v in list(vars(module).items()) if fnmatchcase(n, first)] if first else [module]
    for owner in owners:
        for name in [n for n in list(getattr(owner, "__dict__", {})) if fnmatchcase(n, last)]:
            delattr(owner, name)

def in_child(function, *args):
    out, into = os.pipe()
    child = os.fork()
    if child == 0:
        told = Told()
        logging.getLogger("qdiff_diffusers").addHandler(told)
        try:
            found = function(*args)
            error = None
        except BaseException:
            found, error = None, traceback.format_exc()
        with os.fdopen(into, "w") as file:
            json.dump({"found": found, "error": error, "told": told.messages}, file)
        os._exit(0)
    os.close(into)
    with os.fdopen(out) as file:
        answer = json.load(file)
    os.waitpid(child, 0)
    return answer

def states():
    from qdiff_diffusers.integrations import patches, table
    return {row.target: patches.state(row).name for row in table.TABLE}

"""


@FORKS
def test_with_any_one_name_gone_import_works_one_warning_says_what_is_off_and_the_rest_is_on() -> None:
    """In programs that import diffusers, transformers and PEFT first."""
    pytest.importorskip("peft")
    needed = [row for row in TABLE if can_be_removed(row)]
    rows = [(row.module, row.path) for row in needed]
    found = in_fresh_process(
        PRELUDE
        + f"""
rows = {rows!r}
for module in {sorted({row.module for row in TABLE if row.is_needed()})!r}:
    importlib.import_module(module)
import numpy, jinja2, rich, numba, huggingface_hub  # so that no child imports them

def without(module, path):
    module = importlib.import_module(module)
    remove(module, path)
    import qdiff_diffusers
    config = qdiff_diffusers.RTNConfig(bits=4)
    return states()

print(json.dumps([in_child(without, *row) for row in rows]))
"""
    )
    for row, answer in zip(needed, found, strict=True):
        assert answer["error"] is None, (row.target, answer["error"])
        gone = [other for other in needed if (other.module, other.path) == (row.module, row.path)]  # entries share a dictionary
        told = answer["told"]
        assert len(told) == len(gone), (row.target, told)
        for other, message in zip(gone, told, strict=True):
            assert other.feature in message
            assert other.target in message
            assert f"{other.library} {patches.installed_version(other.library)}" in message
        off = {target for target, state in answer["found"].items() if state != "active"}
        assert off - {other.target for other in TABLE if not other.is_needed()} == {other.target for other in gone}


@FORKS
def test_the_users_own_imports_work_too_when_names_are_gone() -> None:
    """In programs that import qdiff first: the names vanish from modules that are imported later."""
    pytest.importorskip("peft")
    gone = [row for row in TABLE if can_be_removed(row) and row.path not in IMPORTED]
    found = in_fresh_process(
        PRELUDE.replace("import torch, diffusers, transformers, peft, accelerate", "import qdiff_diffusers")
        + f"""
REMOVED = {[(row.module, row.path) for row in gone]!r}
"""
        + """
from qdiff_diffusers.integrations import table

class Saboteur:
    def __init__(self, module, paths):
        self.module, self.paths = module, paths
    def find_spec(self, name, path=None, target=None):
        if name != self.module:
            return None
        from importlib.machinery import PathFinder
        spec = PathFinder.find_spec(name, path, target)
        run = spec.loader.exec_module
        def exec_module(module):
            run(module)
            for gone in self.paths:
                remove(module, gone)
        spec.loader.exec_module = exec_module
        return spec

def user(module, paths):
    sys.meta_path.insert(1, Saboteur(module, paths))
    importlib.import_module(module)
    return states()

later = {}
for module, path in REMOVED:
    if module not in sys.modules:
        later.setdefault(module, set()).add(path)
print(json.dumps({module: in_child(user, module, sorted(paths)) for module, paths in later.items()}))
"""
    )
    assert {"peft.tuners.lora", "transformers.modeling_utils", "diffusers.models.modeling_utils"} <= set(found)
    for module, answer in found.items():
        assert answer["error"] is None, (module, answer["error"])
        expected = [row for row in gone if row.module == module]  # two rows may concern the same name
        assert {target for target, state in answer["found"].items() if state == "off"} == {row.target for row in expected}
        told = [message for message in answer["told"] if message.startswith("qdiff: ")]
        assert len(told) == len(expected), "\n".join(told)


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[types.ModuleType]:
    """A module of a library with a function, a class and a dictionary."""
    file = tmp_path / "module.py"
    file.write_text(
        textwrap.dedent(
            """
            TABLE = {}
            NUMBER = 3
            def double(x):
                "Twice."
                return 2 * x
            class Kind:
                def method(self, x):
                    return x
                @classmethod
                def make(cls, x):
                    return cls, x
                @staticmethod
                def plain(x):
                    return x
            class Other:
                @classmethod
                def make(cls, x):
                    return cls, x
            """
        )
    )
    spec = importlib.util.spec_from_file_location("some_library.module", file)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(patches, "_states", {})
    yield module
    from qdiff_diffusers.integrations.after_import import _watcher

    _watcher.actions.pop(module.__name__, None)


def plus_one(original: Any, *args: Any) -> Any:
    """The body of the rows below."""
    result = original(*args)
    return (result[0], result[1] + 1) if isinstance(result, tuple) else result + 1


@pytest.fixture
def body(monkeypatch: pytest.MonkeyPatch) -> str:
    module = types.ModuleType("qdiff_test_bodies")
    module.plus_one = plus_one  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return "qdiff_test_bodies:plus_one"


@pytest.fixture
def told() -> Iterator[list[str]]:
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    patches.logger.addHandler(handler)
    yield messages
    patches.logger.removeHandler(handler)


def test_functions_methods_and_constructors_are_wrapped_once_as_what_they_were(library: Any, body: str) -> None:
    paths = ("double", "Kind.method", "Kind.make", "Kind.plain")
    rows = [Patch("some_library.module", path, body, feature="one more") for path in paths]
    for _ in range(3):
        patches.apply(rows)
    assert library.double(4) == 9
    assert library.double.__doc__ == "Twice."
    assert library.Kind().method(1) == 2
    assert library.Kind.make(1) == (library.Kind, 2)
    assert library.Kind.plain(1) == library.Kind().plain(1) == 2
    assert hasattr(library.double, MARKER)
    assert library.Other.make(1) == (library.Other, 1)
    assert {patches.state(row).name for row in rows} == {"active"}


def test_a_pattern_means_every_class_that_has_the_method(library: Any, body: str) -> None:
    patches.apply([Patch("some_library.module", "*.make", body, feature="one more")])
    assert library.Kind.make(1) == (library.Kind, 2)
    assert library.Other.make(1) == (library.Other, 2)


@pytest.mark.parametrize("path", ["Gone.method", "Kind.gone", "gone", "*.gone", "NUMBER"])
def test_a_name_that_is_gone_or_no_function_is_told_once(library: Any, body: str, told: list[str], path: str) -> None:
    row = Patch("some_library.module", path, body, feature="counting on")
    other = Patch("some_library.module", "double", body, feature="one more")
    for _ in range(2):
        patches.apply([row, other])
    assert len(told) == 1
    assert "counting on is off" in told[0] and f"some_library.module.{path}" in told[0]
    assert patches.state(row).name == "off"
    assert library.double(4) == 9


def test_a_body_that_cannot_be_imported_leaves_the_original_and_is_told_once(library: Any, told: list[str]) -> None:
    row = Patch("some_library.module", "double", "qdiff_diffusers.nowhere:function", feature="counting on")
    patches.apply([row])
    assert told == []
    assert [library.double(4) for _ in range(3)] == [8, 8, 8]
    patches.apply([row])
    assert library.double(4) == 8
    assert len(told) == 1 and "nowhere" in told[0]
    assert patches.state(row).name == "off"


def test_errors_of_a_body_are_the_callers(library: Any, monkeypatch: pytest.MonkeyPatch, body: str) -> None:
    def fail(original: Any, x: int) -> None:
        raise QDiffError("no")

    monkeypatch.setattr(sys.modules["qdiff_test_bodies"], "plus_one", fail)
    patches.apply([Patch("some_library.module", "double", body, feature="counting on")])
    with pytest.raises(QDiffError, match="no"):
        library.double(4)


def test_versions_that_do_not_need_a_row_are_left_alone(library: Any, body: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patches, "installed_version", lambda name: "2.0")
    old = Patch("some_library.module", "double", body, feature="one more", versions="<2")
    patches.apply([old])
    assert library.double(4) == 8
    assert patches.state(old) == State("not needed")


def test_an_essential_row_that_is_off_is_an_error_once_qdiff_is_used(library: Any, told: list[str]) -> None:
    row = Entry("some_library.module", "GONE", "qdiff_diffusers.config:RTNConfig", "registering", essential=True, key="qdiff")
    patches.apply([row])
    assert len(told) == 1
    patches.require("another_library")
    with pytest.raises(QDiffError, match=r"qdiff does not work with some_library .*GONE.*upgrade qdiff-diffusers"):
        patches.require("some_library")


@pytest.mark.parametrize("library_name", ["diffusers", "transformers"])
def test_a_config_is_refused_where_the_library_does_not_know_qdiff(
    library_name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import diffusers

    row = next(row for row in TABLE if row.essential and row.library == library_name)
    importlib.import_module(row.module)
    monkeypatch.setitem(patches._states, row, State("off", "there is no such table"))
    if library_name == "transformers":
        kind = pytest.importorskip("transformers").T5EncoderModel
    else:
        kind = diffusers.DiTTransformer2DModel
    with pytest.raises(QDiffError, match=f"qdiff does not work with {library_name}"):
        kind.from_pretrained(tmp_path, quantization_config=qdiff_diffusers.RTNConfig(bits=4))


def test_registering_again_changes_nothing() -> None:
    from diffusers.models.modeling_utils import ModelMixin

    before = ModelMixin.__dict__["from_pretrained"].__func__
    qdiff_diffusers.register()
    assert ModelMixin.__dict__["from_pretrained"].__func__ is before


def test_looking_for_a_module_without_importing_it_loses_no_patch() -> None:
    """``importlib.util.find_spec`` asks the same finders, and what it finds is never executed."""
    found = in_fresh_process(
        """
        import importlib.util, json, sys
        import qdiff_diffusers
        assert "diffusers.loaders.lora_pipeline" not in sys.modules
        importlib.util.find_spec("diffusers.loaders.lora_pipeline")
        from diffusers.loaders.lora_pipeline import FluxLoraLoaderMixin
        print(json.dumps(hasattr(FluxLoraLoaderMixin._maybe_expand_lora_state_dict, "of_qdiff")))
        """
    )
    assert found is True


def test_importing_the_package_imports_no_library_that_nobody_asked_for() -> None:
    found = in_fresh_process(
        """
        import json, sys
        import qdiff_diffusers
        heavy = ("peft", "transformers.modeling_utils", "diffusers.pipelines.pipeline_utils", "diffusers.models.modeling_utils")
        print(json.dumps([name for name in heavy if name in sys.modules]))
        """
    )
    assert found == []
