"""``run_eval`` from end to end on tiny pipelines: what it writes, going on, failing rows, several processes."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
import torch
from evaluate_tiny import SMALL, evaluated, subject_of
from safetensors.torch import load_file

from qdiff_diffusers import ConfigError, RTNConfig, quantize
from qdiff_diffusers.evaluation import build, evaluate
from qdiff_diffusers.evaluation.evaluate import Settings, run_eval
from qdiff_diffusers.evaluation.rows import calibration_of, parse_rows
from qdiff_diffusers.evaluation.store import RowStore


class TestWholeRuns:
    def test_writes_every_row_everywhere(self, by_class, tmp_path):
        rows = ["rtn:bits=8", {"name": "AQ <tiny>", "method": "aq", "bits": 2, "effort": 0}]
        results = evaluated(by_class, rows, tmp_path, classes=range(5))
        assert results == json.loads((tmp_path / "results.json").read_text())
        assert [row["name"] for row in results["rows"]] == ["16-bit", "rtn bits=8", "AQ <tiny>"]
        reference, fine, coarse = results["rows"]
        assert fine["scores"]["psnr"][0] > coarse["scores"]["psnr"][0] + 6
        assert fine["scores"]["ssim"][0] > coarse["scores"]["ssim"][0]
        assert reference["bits_per_weight"] == 16 > fine["bits_per_weight"] > 8 > coarse["bits_per_weight"]
        assert reference["size_bytes"] > fine["size_bytes"] > coarse["size_bytes"]
        assert reference["sparsity"] is None and 0 <= fine["sparsity"] < 0.1 and coarse["sparsity"] is not None
        assert all(row["images"] == 4 and row["seconds_per_image"] > 0 for row in results["rows"])
        page, table = (tmp_path / "report.html").read_text(), (tmp_path / "table.md").read_text()
        assert "AQ &lt;tiny&gt;" in page and "rtn bits=8" in page
        assert "http" not in page.replace("http://www.w3.org", "")  # self-contained
        assert len([line for line in table.splitlines() if line.startswith("|")]) == 2 + 3
        assert (tmp_path / "grid.png").stat().st_size > 1000 and not list(tmp_path.rglob("*.part"))

    def test_errors_by_step_and_by_layer_belong_to_the_row(self, by_class, tmp_path):
        skip = {"method": "rtn", "bits": 2, "modules_to_not_convert": ["transformer_blocks.1"]}
        row = evaluated(by_class, [skip], tmp_path, classes=[1])["rows"][1]
        assert [timestep for timestep, _ in row["step_errors"]] == [500, 0]
        assert all(0 < error < 2 for _, error in row["step_errors"])
        touched = {name for name, error in row["layer_errors"].items() if error > 0}
        assert touched == {name for name in row["layer_errors"] if "transformer_blocks.0" in name}
        assert row["layers"] * 2 == row["target_layers"] == len(row["layer_errors"])

    def test_asks_a_pipeline_for_nothing_but_noise(self, of_noise, tmp_path):
        results = evaluated(of_noise, ["rtn:bits=4"], tmp_path)
        assert results["run"]["asked for"] == "nothing" and results["rows"][1]["scores"]["psnr"][0] > 10
        assert "accuracy" not in results["rows"][1]["scores"] and "frechet" not in results["rows"][1]["scores"]

    def test_goes_on_where_it_was_interrupted_with_identical_results(self, of_noise, tmp_path, monkeypatch):
        rows = ["rtn:bits=4", "rtn:bits=2"]
        evaluated(of_noise, rows, tmp_path / "once")
        drawn, draw = [], evaluate._draw

        def interrupted(job, pipe, first, *more):
            drawn.append((job.row.name, first))
            if len(drawn) == 5:
                raise KeyboardInterrupt
            return draw(job, pipe, first, *more)

        monkeypatch.setattr(evaluate, "_draw", interrupted)
        monkeypatch.setattr(evaluate, "PART", 2)
        with pytest.raises(KeyboardInterrupt):
            evaluated(of_noise, rows, tmp_path / "twice")
        partial = json.loads((tmp_path / "twice" / "results.json").read_text())
        assert "failed" not in partial["rows"][0] and partial["rows"][2]["failed"] == "not made yet"
        after = evaluated(of_noise, rows, tmp_path / "twice")
        probed, *drawn = drawn  # the reference draws a few images more, to see what its denoiser is asked
        assert probed == ("16-bit", 0)
        assert drawn[3] == drawn[4] == ("rtn bits=4", 2)  # only the part that was interrupted was begun again
        assert len(drawn) == len(set(drawn)) + 1 == 7
        assert [timeless(row) for row in after["rows"]] == [
            timeless(row) for row in json.loads((tmp_path / "once" / "results.json").read_text())["rows"]
        ]

    def test_a_second_run_draws_nothing_and_writes_the_same_file(self, of_noise, tmp_path, monkeypatch):
        evaluated(of_noise, ["rtn:bits=4"], tmp_path)
        before = (tmp_path / "results.json").read_bytes()
        monkeypatch.setattr(evaluate, "build", lambda *_: pytest.fail("built a model again"))
        evaluated(of_noise, ["rtn:bits=4"], tmp_path)
        assert (tmp_path / "results.json").read_bytes() == before

    def test_more_images_go_on_from_those_there_are(self, of_noise, tmp_path):
        few = evaluated(of_noise, ["rtn:bits=4"], tmp_path, Settings(images=2, paired=2, batch_size=2))
        files = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("images-*")}
        more = evaluated(of_noise, ["rtn:bits=4"], tmp_path)
        assert all(path.stat().st_mtime_ns == time for path, time in files.items())
        assert more["rows"][1]["images"] == 4 and more["rows"][1]["scores"] != few["rows"][1]["scores"]
        assert more["rows"][1]["step_errors"] == few["rows"][1]["step_errors"]

    def test_images_beyond_the_paired_ones_may_be_drawn_in_another_dtype(self, by_class, tmp_path):
        same = replace(SMALL, paired=2)  # a whole batch: results depend on how many images are drawn together
        exact = evaluated(by_class, ["rtn:bits=4"], tmp_path / "exact", same, classes=[0, 3])
        budget = replace(same, rest_dtype="bfloat16")
        assert list(budget.parts(0)) == [(0, 2, "float32"), (2, 4, "bfloat16")] and list(budget.parts(4)) == []
        mixed = evaluated(by_class, ["rtn:bits=4"], tmp_path / "mixed", budget, classes=[0, 3])
        assert mixed["rows"][1]["scores"]["psnr"] == exact["rows"][1]["scores"]["psnr"]
        images = [tmp_path / n / "rows" / r["rows"][1]["folder"] for n, r in (("exact", exact), ("mixed", mixed))]
        drawn = [torch.cat([load_file(path)["images"] for path in sorted(folder.glob("images-*"))]) for folder in images]
        assert torch.equal(drawn[0][:2], drawn[1][:2]) and not torch.equal(drawn[0][2:], drawn[1][2:])
        assert torch.allclose(drawn[0][2:], drawn[1][2:], atol=0.1)
        assert "bfloat16 beyond the compared images" in (tmp_path / "mixed" / "table.md").read_text()

    def test_a_row_that_fails_stops_nobody_and_is_tried_again(self, of_noise, tmp_path, monkeypatch):
        quantize = build.quantize_source

        def broken(source, config, *args, **kwargs):
            if config.bits == 2:
                raise MemoryError("no room for 2 bits")
            return quantize(source, config, *args, **kwargs)

        monkeypatch.setattr(build, "quantize_source", broken)
        results = evaluated(of_noise, ["rtn:bits=2", "rtn:bits=4"], tmp_path)
        assert results["rows"][1]["failed"] == "MemoryError: no room for 2 bits"
        assert "failed" not in results["rows"][2] and results["rows"][2]["scores"]["psnr"]
        for name in ("report.html", "table.md"):
            assert "failed: MemoryError: no room for 2 bits" in (tmp_path / name).read_text()
        monkeypatch.setattr(build, "quantize_source", quantize)
        assert all("failed" not in row for row in evaluated(of_noise, ["rtn:bits=2", "rtn:bits=4"], tmp_path)["rows"])

    def test_two_processes_give_the_scores_of_one(self, of_noise, tmp_path):
        rows = ["rtn:bits=4", "rtn:bits=2"]
        one = evaluated(of_noise, rows, tmp_path / "one")
        subject = subject_of(of_noise)
        two = run_eval(subject, parse_rows(rows, subject), tmp_path / "two", SMALL, workers=2)
        assert [row["scores"] for row in one["rows"]] == [row["scores"] for row in two["rows"]]

    def test_quantized_folders_are_rows(self, by_class, tmp_path):
        quantize(by_class, RTNConfig(bits=4), tmp_path / "whole", dtype=torch.float32)
        shutil.copytree(tmp_path / "whole" / "transformer", tmp_path / "bare")
        rows = [str(tmp_path / "whole"), {"folder": str(tmp_path / "bare"), "name": "bare"}]
        _, whole, bare = evaluated(by_class, rows, tmp_path / "out", classes=[0, 3])["rows"]
        assert whole["name"] == "whole" and whole["scores"] == bare["scores"]
        assert whole["bits_per_weight"] == bare["bits_per_weight"] < 5

    def test_a_calibrated_model_is_better_and_kept(self, by_class, tmp_path):
        rows = [{"method": "rtn", "bits": 2, "calibration": {"samples": 3, "batch_size": 3}}, "rtn:bits=2"]
        results = evaluated(by_class, rows, tmp_path, classes=[1, 2])
        calibrated, plain = results["rows"][1:]
        assert calibrated["scores"]["psnr"][0] > plain["scores"]["psnr"][0]
        assert calibrated["size_bytes"] == plain["size_bytes"]
        kept = [(tmp_path / "rows" / row["folder"] / "model" / "model_index.json").is_file() for row in results["rows"]]
        assert kept == [False, True, False]
        assert [row["name"] for row in results["rows"]] == ["16-bit", "rtn bits=2", "rtn bits=2 (2)"]
        row = parse_rows(rows, subject_of(by_class, classes=[1, 2]))[0]
        found = calibration_of(row, subject_of(by_class, classes=[1, 2]))
        assert (found.class_labels, found.steps, found.guidance_scale, found.samples) == ([1, 2], 2, 1.0, 3)


def timeless(row: dict) -> dict:
    return {key: value for key, value in row.items() if "seconds" not in key and key not in ("machine", "commit")}


class TestStore:
    def test_counts_images_up_to_the_first_gap(self, tmp_path):
        store = RowStore(tmp_path, "A row: 2 bits", {"a": 1})
        images = torch.rand(6, 1, 4, 4)
        store.add_images(0, images[:2])
        store.add_images(4, images[4:])
        assert store.count_images() == 2
        store.add_images(2, images[2:4])
        assert store.count_images() == 6
        assert torch.allclose(store.images(5), images[:5], atol=1e-3)

    def test_belongs_to_what_made_it_and_not_to_the_name(self, tmp_path):
        RowStore(tmp_path, "one name", {"bits": 2}).write_facts({"x": 1})
        assert RowStore(tmp_path, "another", {"bits": 2}).facts() == {"x": 1}
        assert RowStore(tmp_path, "one name", {"bits": 3}).facts() == {}

    def test_damage_is_named(self, tmp_path):
        store = RowStore(tmp_path, "r", {})
        store.write_facts({})
        (store.folder / "row.json").write_text("{")
        with pytest.raises(ConfigError, match="damaged; remove"):
            store.facts()
