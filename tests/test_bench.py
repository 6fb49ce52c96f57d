"""The speed benchmarks: order and ratios of the timing, peers that fail, reports, resuming, and the command's errors."""

from __future__ import annotations

import json
import math
import os

import pytest
import qdiff_kernels
import tiny_models
import torch
from torch import nn

from qdiff_diffusers.bench import layers, models, ours
from qdiff_diffusers.bench.layers import Shape, run_layers
from qdiff_diffusers.bench.models import MODELS, Model, fill, run_models
from qdiff_diffusers.bench.report import layers_markdown, models_markdown
from qdiff_diffusers.bench.results import Results, busy, busy_cores, facts
from qdiff_diffusers.bench.timing import BASELINE_EVERY, Call, CpuTimer, Race, Spread, race
from qdiff_diffusers.cli import main
from qdiff_diffusers.errors import ConfigError
from qdiff_diffusers.measuring import peers
from qdiff_diffusers.measuring.contenders import Contender, plain, resident_bytes, select

CPU = torch.device("cpu")


class Clock:
    """A clock that functions move on; ``load`` slows everything that runs."""

    def __init__(self) -> None:
        self.now, self.load, self.calls = 0.0, 1.0, []

    def __call__(self) -> float:
        return self.now

    def call(self, name: str, seconds: float, twin: bool = False) -> Call:
        def run() -> None:
            self.calls.append(name)
            self.now += seconds * self.load

        return Call(run, lambda: self.calls.append(f"{name}'s twin") if twin else None)


def run_race(clock: Clock, speeds: dict[str, float], budget: float = 1.0) -> dict[str, Race]:
    calls = {name: clock.call(name, seconds) for name, seconds in speeds.items()}
    return race(calls, clock.call("bf16", 0.125), CpuTimer(clock=clock), budget)


class TestTiming:
    def test_rounds_alternate_their_direction(self):
        clock = Clock()
        run_race(clock, {"a": 0.125, "b": 0.125}, budget=0.5)
        assert clock.calls == ["bf16", *["bf16", "a", "b", "bf16", "b", "a"] * 2]

    def test_the_baseline_is_timed_anew_every_few_calls(self):
        clock = Clock()
        run_race(clock, {f"f{i}": 0.125 for i in range(BASELINE_EVERY + 1)}, budget=0.375)
        assert clock.calls.count("bf16") == 1 + 2 * 3

    def test_the_budget_decides_the_rounds(self):
        races = run_race(Clock(), {"fast": 0.0625, "even": 0.25, "slow": 5.0})
        assert {name: len(entry.seconds) for name, entry in races.items()} == {"fast": 16, "even": 4, "slow": 2}

    def test_a_ratio_is_to_the_baseline_of_the_same_round(self):
        """The machine slows down tenfold half-way; the medians of the times would say 0.1 or 1 depending on the rounds."""
        clock = Clock()

        def twice_as_fast() -> None:
            clock.now += 0.05 * clock.load
            clock.load = 10.0 if len(clock.calls) > 8 else 1.0

        entry = race({"f": Call(twice_as_fast)}, clock.call("bf16", 0.1), CpuTimer(clock=clock), 1.0)["f"]
        assert len(set(entry.baseline)) > 1
        assert Spread.of(entry.ratios).median == pytest.approx(2.0)

    def test_a_function_that_fails_drops_out_and_says_why(self):
        clock = Clock()

        def fail() -> None:
            raise RuntimeError("no kernel for this shape\nmore")

        races = race({"bad": Call(fail), "a": clock.call("a", 0.125)}, clock.call("bf16", 0.1), CpuTimer(clock=clock), 1.0)
        assert races["bad"].failure == "RuntimeError: no kernel for this shape"
        assert len(races["a"].seconds) == 8

    def test_a_twin_is_called_untimed_where_the_caches_are_emptied(self):
        clock = Clock()
        assert CpuTimer(flush=1024, clock=clock)(clock.call("a", 0.5, twin=True)) == 0.5
        assert CpuTimer(clock=clock)(clock.call("b", 0.5, twin=True)) == 0.5
        assert clock.calls == ["a's twin", "a", "b"]

    def test_spread_of_a_single_value(self):
        assert Spread.of([2.0]) == Spread(2.0, 2.0, 2.0, 2.0)

    def test_quartiles(self):
        spread = Spread.of([1.0, 2.0, 3.0, 4.0, 5.0])
        assert (spread.median, spread.q1, spread.q3, spread.low) == (3.0, 2.0, 4.0, 1.0)
        assert spread.relative == pytest.approx(2 / 3)


class TestContenders:
    def test_only_takes_families_names_and_patterns(self):
        everyone = [*plain(), *ours.contenders(ours.Packer(), CPU), *peers.contenders(CPU)]
        assert {c.family for c in select(everyone, ["ours"])} == {"ours"}
        assert [c.name for c in select(everyone, ["qdiff-aq2*"])] == ["qdiff-aq2", "qdiff-aq2-a8"]
        assert [c.name for c in select(everyone, ["quanto-int4"])] == ["quanto-int4"]
        assert select(everyone, None) == everyone

    def test_names_are_unique(self):
        names = [c.name for c in (*plain(), *ours.contenders(ours.Packer(), CPU), *peers.contenders(CPU))]
        assert len(names) == len(set(names))

    def test_a_missing_peer_says_what_to_install(self):
        contender = Contender("x", "x", lambda layer: layer, 4, "some-package", ("no_such_module.inside",))
        assert contender.unavailable(CPU) == "not installed: pip install some-package"

    def test_a_peer_for_gpus_is_not_tried_on_a_cpu(self):
        assert [c.unavailable(CPU) for c in peers.contenders(CPU) if c.family == "gemlite"] == ["does not run on cpu"] * 5

    def test_building_leaves_the_dense_layer_alone(self):
        layer = nn.Linear(64, 64)
        before = layer.weight.clone()
        for contender in ours.contenders(ours.Packer(), CPU)[:1]:
            contender.build(layer)
        assert type(layer) is nn.Linear and torch.equal(layer.weight, before)

    def test_bytes_count_every_tensor_once(self):
        model = nn.Sequential(nn.Linear(8, 4), nn.Linear(8, 4))
        model[1].weight = model[0].weight
        model.state = {"scales": [torch.zeros(10, dtype=torch.float16)]}
        assert resident_bytes(model) == 4 * (32 + 4 + 4) + 20


class TestOurs:
    @pytest.mark.parametrize("preset", sorted(ours.PRESETS))
    def test_a_preset_multiplies_by_the_weight_it_stands_for(self, preset):
        layer = nn.Linear(64, 300, bias=False).requires_grad_(False)
        packed = ours.Packer(whole_model=True).convert(_copy(layer), preset, None)
        assert packed.weight_shape == (300, 64)
        rows = packed.stands_for(layer.weight)
        assert torch.equal(rows[ours.ROWS :], layer.weight[: 300 - ours.ROWS])
        error = (packed.dequantize() - rows).norm() / rows.norm()
        assert float(error) < {2: 0.5, 3: 0.3, 4: 0.2, 6: 0.05, 8: 0.04}[int(preset[-1])]

    def test_operations_of_look_up_tables_are_counted_for_codebooks_alone(self):
        packer = ours.Packer()
        codebook, integer = (packer.convert(nn.Linear(256, 2048), preset, None) for preset in ("aq2", "int4"))
        share = ours.lookup_share(codebook, tokens=1)
        # 4 codebooks of 256 vectors of 16: half as many entries as rows
        assert share["multiplications"] == pytest.approx(0.5, rel=0.02) and share["operations"] < 0.7
        assert ours.lookup_share(integer, tokens=1) is None

    def test_both_kinds_of_activations_share_one_quantization_but_no_memory(self):
        packer = ours.Packer()
        first, second = (packer.convert(nn.Linear(64, 64), "int4", activations) for activations in (None, "int8"))
        assert torch.equal(first.codes, second.codes) and first.codes.data_ptr() != second.codes.data_ptr()
        assert (first.spec.activations, second.spec.activations) == ("none", "int8")


def _copy(layer: nn.Linear) -> nn.Linear:
    out = nn.Linear(layer.in_features, layer.out_features, bias=False)
    out.load_state_dict(layer.state_dict())
    return out


class TestShapes:
    def test_linear_and_convolution(self):
        assert Shape.parse("3072x12288") == Shape("3072x12288", 3072, 12288)
        assert Shape.parse("conv640@32") == Shape("conv640@32", 640, 640, 32)

    def test_an_adaln_layer_sees_one_row_per_image(self):
        assert Shape.parse(layers.ADALN).tokens([1, 2, 16, 64]) == [1, 2]
        assert Shape.parse(layers.ADALN).tokens([16]) == [1, 2]

    def test_a_convolution_has_its_own_number_of_tokens(self):
        assert Shape.parse("conv320@16").tokens([1, 16]) == [512]

    @pytest.mark.parametrize("text", ["3072", "3072x", "0x4", "conv320", "conv@3", "-1x4", ""])
    def test_anything_else_is_refused(self, text):
        with pytest.raises(ConfigError, match="INxOUT"):
            Shape.parse(text)


def measure(results: Results, *, shapes: str = "64x32", only=("torch", "qdiff-int4*"), monkeypatch=None, extra=()) -> Results:
    if monkeypatch is not None:
        everyone = lambda device, packer, only: [*select([*plain(), *ours.contenders(packer, device)], only), *extra]  # noqa: E731
        monkeypatch.setattr(layers, "contenders_for", everyone)
    shape = Shape.parse(shapes)
    run_layers(results, [shape], [1, 3], device=CPU, dtype=torch.bfloat16, budget=1e-3, only=list(only))
    return results


@pytest.fixture
def run_facts():
    return facts(CPU, torch.bfloat16, 1e-3)


@pytest.fixture(autouse=True)
def nothing_takes_long(monkeypatch):
    """No compiling and no waiting to see who else uses the machine."""
    monkeypatch.setattr("qdiff_diffusers.bench.results.busy_cores", lambda: 0.0)
    for place in ("measuring.contenders", "bench.models"):
        monkeypatch.setattr(f"qdiff_diffusers.{place}.compiled", lambda module: module)
    with qdiff_kernels.use("torch"):
        yield


class TestLayers:
    def test_every_cell_has_error_time_and_ratio(self, tmp_path, run_facts):
        results = measure(Results(tmp_path / "layers", run_facts))
        assert len(results.cells) == 2 * 4
        for cell in results.cells.values():
            assert cell["error"] < (0.2 if cell["family"] == "ours" else 0.01)
            assert cell["ms"]["low"] <= cell["ms"]["median"] and cell["ratio"]["median"] > 0 and cell["rounds"] >= 2
        stored = json.loads((tmp_path / "layers.json").read_text())
        assert len(stored["cells"]) == 8 and stored["facts"]["threads"] == torch.get_num_threads()

    def test_convolutions(self, tmp_path, run_facts):
        results = measure(Results(tmp_path / "layers", run_facts), shapes="conv16@4", only=["torch", "qdiff-int8*"])
        assert [cell["tokens"] for cell in results.cells.values()] == [32] * 4
        assert all(cell["error"] < 0.05 for cell in results.cells.values())

    def test_peers_that_fail_become_rows(self, tmp_path, run_facts, monkeypatch):
        def refuse(layer):
            raise ImportError("built for another torch")

        class Nonsense(nn.Linear):
            def forward(self, x):
                return super().forward(x) * math.nan

        class Moody(nn.Linear):
            def forward(self, x):
                if len(x) > 1:
                    raise RuntimeError("one token only")
                return super().forward(x)

        def become(cls):
            def convert(layer):
                layer.__class__ = cls
                return layer

            return convert

        extra = [
            Contender("absent", "absent", refuse, 4, "absent", ("no_such_module",)),
            Contender("refuses", "refuses", refuse, 4),
            Contender("nonsense", "nonsense", become(Nonsense), 4),
            Contender("moody", "moody", become(Moody), 4),
        ]
        results = measure(Results(tmp_path / "layers", run_facts), only=["torch"], monkeypatch=monkeypatch, extra=extra)
        reasons = {(c["contender"], c["tokens"]): c.get("reason") for c in results.cells.values()}
        assert reasons["absent", 1] == "not installed: pip install absent"
        assert reasons["refuses", 3] == "ImportError: built for another torch"
        assert reasons["nonsense", 1].startswith("broken")
        assert reasons["moody", 1] is None and "one token only" in reasons["moody", 3]
        report = layers_markdown(results)
        assert "- absent: not installed: pip install absent" in report
        assert "M=3: RuntimeError: one token only" in report

    def test_progress_counts_every_cell_once(self, tmp_path, run_facts):
        shapes, seen = [Shape.parse("64x32")], []
        total = layers.count_cells(shapes, [1, 3], ["torch", "gemlite", "qdiff-fp4*"], CPU)
        settings = {"device": CPU, "dtype": torch.bfloat16, "budget": 1e-3, "only": ["torch", "gemlite", "qdiff-fp4*"]}
        run_layers(Results(tmp_path / "layers", run_facts), shapes, [1, 3], advance=seen.append, **settings)
        assert len(seen) == total == 2 * 9

    def test_the_report_has_a_table_per_shape(self, tmp_path, run_facts):
        results = measure(Results(tmp_path / "layers", run_facts), only=["qdiff-int4*"])
        for cell in list(results.cells.values()):  # the same figures for a shape that nobody has measured
            results.cells[(*cell["key"], "again")] = cell | {"shape": "32x64"}
        report = layers_markdown(results)
        assert "### 64x32" in report and "### 32x64" in report
        heads = next(line for line in report.splitlines() if line.startswith("| contender"))
        rows = [line for line in report.splitlines() if line.startswith("| qdiff-int4 ")]
        assert "M=1 " in heads and "M=3 " in heads and len(rows) == 2
        assert {line.count("|") for line in report.splitlines() if line.startswith("|")} == {heads.count("|")}

    def test_busy_cores_are_few_and_not_negative(self):
        assert 0 <= busy_cores(0.05) <= 2 * (os.cpu_count() or 1)

    def test_a_busy_machine_is_named(self, tmp_path, run_facts):
        run_facts["busy_cores"] = 3.5
        assert busy(run_facts)
        report = layers_markdown(measure(Results(tmp_path / "layers", run_facts), only=["torch"]))
        assert "The machine was busy: other programs used 3.5 cores" in report


class TestResume:
    def test_measured_cells_are_kept(self, tmp_path, run_facts):
        before = measure(Results(tmp_path / "layers", run_facts), only=["qdiff-int4*"])
        times = {key: cell["ms"] for key, cell in before.cells.items()}
        after = measure(Results(tmp_path / "layers", run_facts, resume=True), only=["qdiff-int4*", "qdiff-int8*"])
        assert len(after.cells) == 8
        assert all(after.cells[key]["ms"] == ms for key, ms in times.items())

    def test_other_facts_start_anew_and_say_which(self, tmp_path, run_facts):
        measure(Results(tmp_path / "layers", run_facts), only=["qdiff-int4*"])
        results = Results(tmp_path / "layers", run_facts | {"threads": 96, "date": "2001-01-01"}, resume=True)
        assert results.cells == {} and results.dropped == ["threads"]

    def test_a_foreign_file_is_refused(self, tmp_path, run_facts):
        (tmp_path / "layers.json").write_text('{"rows": []}')
        with pytest.raises(ConfigError, match="leave out --resume"):
            Results(tmp_path / "layers", run_facts, resume=True)


@pytest.fixture
def tiny(monkeypatch) -> str:
    """A DiT of two tiny blocks among the models."""

    def inputs(device, dtype):
        given = tiny_models.dit_inputs()
        return given | {"hidden_states": given["hidden_states"].to(dtype)}

    monkeypatch.setitem(MODELS, "tiny", Model(tiny_models.dit, inputs, "two tiny blocks"))
    return "tiny"


class TestModels:
    def measure(self, results: Results, only: list[str]) -> Results:
        run_models(results, ["tiny"], device=CPU, dtype=torch.bfloat16, budget=1e-3, only=only)
        return results

    def test_a_packed_model_is_timed_beside_the_dense_one(self, tiny, tmp_path, run_facts):
        results = self.measure(Results(tmp_path / "models", run_facts), ["torch", "qdiff-int4*"])
        cells = {cell["contender"]: cell for cell in results.cells.values()}
        assert set(cells) == {"torch", "torch-compile", "qdiff-int4", "qdiff-int4-a8"}
        packed = cells["qdiff-int4-a8"]
        assert packed["layers"] > 10 and packed["ratio"]["median"] > 0 and packed["rounds"] >= 2
        assert packed["bytes"] < packed["dense_bytes"] == cells["torch"]["bytes"]
        assert "int8 activations" in packed["format"]
        assert json.loads((tmp_path / "models.json").read_text())["cells"]

    def test_the_report_has_time_speed_and_memory(self, tiny, tmp_path, run_facts):
        report = models_markdown(self.measure(Results(tmp_path / "models", run_facts), ["qdiff-fp4", "gemlite"]))
        row = next(line for line in report.splitlines() if line.startswith("| qdiff-fp4 "))
        assert "### tiny" in report and "e1m2uz" in row
        assert "- gemlite-int4: does not run on cpu" in report

    def test_a_peer_that_fails_becomes_a_row(self, tiny, tmp_path, run_facts, monkeypatch):
        def refuse(layer):
            raise ValueError("blocks of 256")

        def infinite(layer):
            layer.weight.fill_(math.inf)
            return layer

        broken = [Contender("refuses", "refuses", refuse, 4), Contender("infinite", "infinite", infinite, 4)]
        monkeypatch.setattr(models, "contenders_for", lambda device, packer, only: [*broken, *plain()[:1]])
        results = self.measure(Results(tmp_path / "models", run_facts), [])
        reasons = {cell["contender"]: cell.get("reason") for cell in results.cells.values()}
        assert reasons["refuses"] == "ValueError: blocks of 256" and "not finite" in reasons["infinite"]
        assert reasons["torch"] is None  # what the peers did to their copies is not seen here

    def test_ours_can_be_compiled_too_beside_the_eager_ones(self, tiny, tmp_path, run_facts):
        results = Results(tmp_path / "models", run_facts)
        options = {"device": CPU, "dtype": torch.bfloat16, "budget": 1e-3, "only": ["qdiff-int4"], "compiled_too": True}
        run_models(results, ["tiny"], **options)
        cells = {cell["contender"]: cell for cell in results.cells.values()}
        assert set(cells) == {"qdiff-int4", "qdiff-int4-compile"}
        assert all(cell["layers"] == cells["qdiff-int4"]["layers"] and cell["ratio"] for cell in cells.values())

    def test_resuming_keeps_what_was_measured(self, tiny, tmp_path, run_facts):
        first = self.measure(Results(tmp_path / "models", run_facts), ["qdiff-int8*"])
        again = self.measure(Results(tmp_path / "models", run_facts, resume=True), ["qdiff-int8*", "torch"])
        assert len(again.cells) == 4
        assert all(again.cells[key] == cell for key, cell in first.cells.items())

    @pytest.mark.parametrize("name", sorted(MODELS))
    def test_every_model_can_be_made(self, name):
        with torch.device("meta"):
            model = MODELS[name].make()
        billions = sum(p.numel() for p in model.parameters()) / 1e9
        sizes = {"dit-xl-2": 0.75, "flux-slice": 1.03, "flux": 11.9, "sdxl-unet": 2.57, "sdxl-slice": 0.90}
        name = name.removesuffix("-512").removesuffix("-4096")  # a slice is one, however many tokens it is given
        assert billions == pytest.approx(sizes[name], rel=0.02)

    def test_filled_models_have_small_weights_and_finite_outputs(self):
        model = fill(tiny_models.dit, CPU, torch.bfloat16)
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
        given = tiny_models.dit_inputs()
        output = model(given["hidden_states"].bfloat16(), given["timestep"], given["class_labels"]).sample
        assert output.isfinite().all() and output.std() > 0


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as end:
        main([str(argument) for argument in arguments])
    return end.value.code


class TestCommand:
    @pytest.mark.parametrize(
        ("options", "said"),
        [
            (["--shapes", "big"], "INxOUT"),
            (["--tokens", "1,two"], "'two'"),
            (["--tokens", "0"], "'0'"),
            (["--tokens", ","], "','"),
            (["--only", "ourz"], "'ourz'"),
            (["--dtype", "int8"], "bfloat16"),
            (["--budget", "0"], "budget"),
            (["--device", "toaster"], "toaster"),
        ],
    )
    def test_a_mistake_costs_one_line(self, options, said, tmp_path, capsys):
        assert run("bench", "layers", "-o", tmp_path / "out", *options) == 2
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("qdiff: ")]
        assert len(lines) == 1 and said in lines[0]
        assert not (tmp_path / "out").exists()

    def test_layers_prints_the_table_and_writes_both_files(self, tmp_path, capsys):
        arguments = ["--shapes", "64x32", "--tokens", "2", "--only", "torch,qdiff-int4*", "--budget", "0.001", "--device", "cpu"]
        assert run("bench", "layers", *arguments, "-o", tmp_path) == 0
        out = capsys.readouterr().out
        assert "qdiff-int4" in out and str(tmp_path / "layers_cpu.md") in out
        assert (tmp_path / "layers_cpu.md").read_text() in out

    def test_models_prints_the_table(self, tiny, tmp_path, capsys):
        arguments = ["--model", tiny, "--only", "qdiff-int4*", "--budget", "0.001", "--device", "cpu"]
        assert run("bench", "models", *arguments, "-o", tmp_path) == 0
        assert "qdiff-int4-a8" in capsys.readouterr().out and (tmp_path / "models_cpu.md").exists()

    def test_an_unknown_model_is_named(self, tmp_path, capsys):
        assert run("bench", "models", "--model", "dalle", "-o", tmp_path / "out") == 2
        assert "'dalle'" in capsys.readouterr().err and not (tmp_path / "out").exists()

    def test_list_names_every_contender(self, capsys):
        assert run("bench", "list", "--device", "cpu") == 0
        out = capsys.readouterr().out
        assert all(word in out for word in ("qdiff-svd4-a4", "torchao-int8", "gemlite-int4", "does not run on cpu"))
