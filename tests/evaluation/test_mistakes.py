"""What ``qdiff eval`` refuses, in one line each and before any work, and its command."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from evaluate_tiny import evaluated, subject_of

from qdiff_diffusers import ConfigError
from qdiff_diffusers.cli import main
from qdiff_diffusers.cli.eval import parse_classes
from qdiff_diffusers.evaluation.rows import parse_rows, read_row_file
from qdiff_diffusers.evaluation.subject import find_subject

LISTS = Path(__file__).parents[2] / "benchmarks" / "quality"


class TestMistakes:
    """One clear line each, before any work."""

    @pytest.mark.parametrize(
        ("entry", "message"),
        [
            ("gptq:bits=2", "'gptq:bits=2' is no method"),
            ("aq:bits=7", "bits must be one of 1, 1.5, 2, 3, 4, got 7"),
            ("rtn:bits=4,rank=8", "rank does not go with method rtn; it takes"),
            ("aq:bits", "expected key=value, got 'bits'"),
            ({"bits": 2}, "one of method, folder and peer"),
            ({"method": "rtn", "folder": "x"}, "one of method, folder and peer"),
            ({"peer": "nobody"}, "unknown peer 'nobody'"),
            ({"peer": "gguf-Q4_0", "bits": 2}, "a row with a peer takes no bits"),
            ({"folder": "/no/such/folder"}, "neither a local folder nor"),
            (7, "a text such as aq:bits=2 or a mapping"),
            ({"method": "rtn", "bits": 4, "modules_to_not_convert": ["nonsense"]}, "no layer of .* has 'nonsense' in its name"),
            ({"method": "rtn", "bits": 4, "calibration": {"stepz": 3}}, "row rtn bits=4: calibration has no setting stepz"),
            ({"method": "rtn", "bits": 4, "calibration": [1]}, "row rtn bits=4: calibration must be a mapping"),
            ({"method": "rtn", "bits": 4, "overrides": {"nowhere": None}}, "no layer of .* has 'nowhere' in its name"),
        ],
    )
    def test_rows(self, by_class, entry, message):
        with pytest.raises(ValueError, match=message):
            parse_rows([entry], subject_of(by_class, classes=[0]))

    @pytest.mark.parametrize("path", sorted(LISTS.glob("*.yaml")), ids=lambda path: path.stem)
    def test_the_lists_of_the_committed_tables_are_understood(self, path, by_class):
        """Every row of its own under a name of its own; those on inputs say what to run."""
        entries = read_row_file(path)["rows"]
        rows = parse_rows(entries, subject_of(by_class, classes=range(10)))
        assert len({row.name for row in rows}) == len(rows) == len(entries)
        definitions = [json.dumps(row.definition(), sort_keys=True) for row in rows]
        assert len(set(definitions)) == len(rows)
        for row in rows:
            assert row.kind == "peer" or row.calibration is not None or not row.config().needs_calibration

    def test_settings_in_brackets_keep_their_commas(self, by_class):
        (row,) = parse_rows(["rtn:bits=4,modules_to_not_convert=[attn1, ff],group_size=row"], subject_of(by_class, classes=[0]))
        assert row.config().modules_to_not_convert == ["attn1", "ff"] and row.config().group_size == "row"

    def test_files_of_rows(self, tmp_path):
        path = tmp_path / "rows.yaml"
        path.write_text("rows: {a: 1}")
        with pytest.raises(ConfigError, match="must hold a list of rows"):
            read_row_file(path)
        path.write_text("- [unclosed")
        with pytest.raises(ConfigError, match="cannot be read"):
            read_row_file(path)
        path.write_text("model: dit\nimages: 7\nrows:\n  - rtn:bits=4\n  - {method: aq, bits: 2}\n")
        assert read_row_file(path) == {"model": "dit", "images": 7, "rows": ["rtn:bits=4", {"method": "aq", "bits": 2}]}

    def test_subjects(self, by_class, tmp_path):
        with pytest.raises(ConfigError, match="single model"):
            find_subject(str(by_class / "transformer"))
        with pytest.raises(ConfigError, match="no local folder"):
            find_subject("nobody/nothing")
        with pytest.raises(ConfigError, match="takes one of them"):
            find_subject(str(by_class), classes=[1], prompts=["a shoe"])
        (tmp_path / "prompts.txt").write_text("\n  \n")
        with pytest.raises(ConfigError, match="holds no prompt"):
            find_subject(str(by_class), prompts=tmp_path / "prompts.txt")
        with pytest.raises(ConfigError, match="cannot read prompts"):
            find_subject(str(by_class), prompts=tmp_path / "missing.txt")
        with pytest.raises(ConfigError, match="list of prompts or classes is empty"):
            find_subject(str(by_class), classes=[])

    def test_classes_are_written_as_ranges(self):
        assert parse_classes("0-3,7") == [0, 1, 2, 3, 7]
        for text in ("", "a", "3-1", "1-", "-1"):
            with pytest.raises(ConfigError, match="classes are such as"):
                parse_classes(text)

    def test_a_model_that_cannot_run_is_an_error_and_not_a_row(self, by_class, tmp_path):
        with pytest.raises(ConfigError, match=r"16-bit model of .* cannot be run: TypeError"):
            evaluated(by_class, ["rtn:bits=4"], tmp_path)  # asked for nothing, it wants a class


class TestCommand:
    def run(self, *arguments: object) -> int:
        with pytest.raises(SystemExit) as end:
            main([str(argument) for argument in arguments])
        return end.value.code

    def test_rows_from_a_file_and_from_options(self, by_class, tmp_path, capsys):
        file = tmp_path / "rows.yaml"
        file.write_text(f"model: {by_class}\nclasses: 0-3\nguidance_scale: 1\nimages: 9\nsteps: 2\nrows: ['rtn:bits=4']\n")
        assert self.run("eval", "--rows", file, "-c", "rtn:bits=2", "--images", 2, "-o", tmp_path / "out", "--workers", 1) == 0
        results = json.loads((tmp_path / "out" / "results.json").read_text())
        assert [row["name"] for row in results["rows"]] == ["16-bit", "rtn bits=4", "rtn bits=2"]
        assert results["run"]["images"] == 2 and results["run"]["labels"] == [0, 1, 2, 3]
        printed = capsys.readouterr().out
        assert "rtn bits=2" in printed and "report.html" in printed

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ([], "name a model"),
            (["dit"], "there is no row to evaluate"),
            (["dit", "-c", "rtn:bits=4", "--dtype", "int3"], "dtype must be one of"),
            (["dit", "-c", "rtn:bits=4", "--rest-dtype", "int3"], "rest_dtype must be one of"),
            (["dit", "-c", "rtn:bits=4", "--size", "big"], "size is such as 512x512"),
            (["dit", "--rows", "/no/such.yaml"], "cannot be read"),
        ],
    )
    def test_mistakes(self, arguments, message, capsys, tmp_path):
        assert self.run("eval", *arguments, "-o", tmp_path / "out") == 2
        assert message in capsys.readouterr().err
        assert not (tmp_path / "out").exists()

    def test_unknown_settings_in_a_file(self, capsys, tmp_path):
        (tmp_path / "rows.yaml").write_text("model: dit\nimgaes: 4\nrows: ['rtn:bits=4']\n")
        assert self.run("eval", "--rows", tmp_path / "rows.yaml") == 2
        assert "unknown settings imgaes" in capsys.readouterr().err

    def test_names_the_peers(self, capsys):
        assert self.run("eval", "--list-peers") == 0
        names = {line.split()[0] for line in capsys.readouterr().out.splitlines()}
        assert {"gguf-Q4_K", "gguf-Q3_K", "gguf-Q2_K", "sdnq-uint3-svd", "quanto-int2", "bitsandbytes-nf4"} <= names
