"""What the raw samples are turned into: summaries, ranks, tables, pictures, the page and the exit status."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bench import agree, arguments, curves, report, short
from bench.document import load
from bench.plot import draw
from bench.statistics import compare, noise_warnings, process_noise, ranking, ratio, summarise
from bench.summaries import tables
from bench.table import number, size
from bench.workloads.stall_figures import end_to_end, stolen
from ckptengine.cli import bench as command
from ckptengine.errors import UnreadableFormat


def block(every: int, saves: list[dict[str, Any]], steps: list[list[float]], drained_s: float) -> dict[str, Any]:
    trace = {"steps": steps, "saves": saves, "end_s": steps[-1][1], "drained_s": drained_s}
    return {"every": every, "trace": trace, "checks": ["ok"] * len(saves), "repeatable": True}


def save(start_s: float, returned_s: float, fence_s: float, durable_s: float) -> dict[str, Any]:
    return {"step": 1, "start_s": start_s, "returned_s": returned_s, "fence_s": fence_s, "durable_s": durable_s}


def test_stolen_is_blocked_plus_the_slow_down_while_in_flight() -> None:
    # A plain step takes 1 s; saved at 1.0 for 0.25 s; the next step is blocked 0.5 s and 0.125 s slower.
    one = block(
        2,
        [save(1.0, 1.25, 0.5, 2.5)],
        [[0.0, 1.0, 0.0], [1.25, 2.875, 0.5], [2.875, 3.875, 0.0], [3.875, 6.0, 0.0]],
        6.0,
    )
    (sample,) = stolen(1.0, one)
    assert sample == {"blocked_s": 0.75, "slower_s": 0.125, "stolen_s": 0.875, "durable_s": 1.5}
    assert end_to_end(1.0, one) == 1.5


def test_a_save_that_the_block_did_not_see_to_its_end_does_not_count() -> None:
    steps = [[0.0, 1.0, 0.0], [1.5, 2.5, 0.0]]
    assert stolen(1.0, block(2, [save(1.0, 1.5, 0.0, 9.0)], steps, 9.0)) == []
    assert len(stolen(1.0, block(2, [save(1.0, 1.5, 0.0, 2.0)], steps, 2.5))) == 1


def test_what_cannot_be_told_apart_shares_a_rank() -> None:
    samples = {"a": [[1.0, 1.1, 1.2]], "b": [[1.15, 1.25, 1.3]], "c": [[5.0, 5.1, 5.2]], "none": [[]]}
    assert ranking(samples) == [["a", "b"], ["c"]]
    assert ranking({"a": [[1.0]], "c": [[1.4]]}, resolution=0.5) == [["a", "c"]]
    told = noise_warnings("stolen", samples, noise=2.0)
    assert any("not told apart: a, b" in line for line in told)
    assert any("below the noise" in line and "c" not in line.rpartition(":")[2] for line in told)


def test_engines_are_told_apart_only_beyond_every_kind_of_noise() -> None:
    steady, slower = [[1.0, 1.01], [1.02, 1.03]], [[1.3, 1.31], [1.32, 1.33]]
    assert compare(steady, slower, 0.0, 0.1) == -1
    assert compare(slower, steady, 0.0, 0.1) == 1
    assert compare(steady, slower, 0.5, 0.1) == 0, "the difference is below the resolution"
    assert compare(steady, slower, 0.0, 0.3) == 0, "the difference is below what processes differ by"
    assert compare([[1.0, 1.0], [2.0, 1.0]], slower, 0.0, 0.1) == 0, "one process of the first was slower"
    assert compare(steady, [[]], 0.0, 0.0) == 0
    assert compare([[1.0, 1.01]], [[1.5, 1.51]], 0.0, 0.1) == 0, "two samples each can lie close to each other by luck"
    assert compare([[1.0, 1.01]], [[2.5, 2.51]], 0.0, 0.1) == -1
    wide = [[1.6, 1.6], [3.0, 3.0]]
    assert compare(steady, wide, 0.0, 0.1) == 0, "its processes differ more from each other than from the first"
    assert process_noise({"a": [[1.0], [3.0]], "b": [[2.0, 2.0], [2.0]], "c": [[5.0]]}) == 0.5
    assert process_noise({"a": [[1.0]]}) == 0.0


def test_summaries_and_numbers() -> None:
    found = summarise([3.0, 1.0, 2.0])
    assert found is not None
    assert (found.median, found.low, found.high, found.count) == (2.0, 1.0, 3.0, 3)
    assert summarise([]) is None
    assert ratio(found, None) is None
    assert ratio(found, summarise([4.0])) == 0.5
    assert [number(value) for value in (0, 0.01234, 1.234, 12.34, 123.4)] == ["0", "0.012", "1.23", "12.3", "123"]
    assert size(1536) == "1.50 KiB"


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A real tiny run through the command line, with every output."""
    folder = tmp_path_factory.mktemp("result")
    files = [str(folder / name) for name in ("result.json", "result.png")]
    status = command.main(
        ["--tiny", "--workload", "stall,metadata", "--rivals", "torch-save", "--repetitions", "1",
         "--steps", "4", "--every", "1,2", "--json", files[0], "--plot", files[1], "--directory", str(folder)]
    )  # fmt: skip
    document = load(Path(files[0]))
    assert (folder / "result.png").stat().st_size > 10_000
    return {"status": status, "document": document, "left": sorted(path.name for path in folder.iterdir())}


def test_one_command_measures_shows_and_writes(result: dict[str, Any]) -> None:
    assert result["status"] == 0
    assert result["left"] == ["result.json", "result.png"]
    shown = {table.title.partition(":")[0]: table for table in tables(result["document"])}
    assert set(shown) == {"stall", "metadata"}
    engines = {row[0]: row for row in shown["stall"].rows}
    assert set(engines) == {"none", "pwrite", "ckptengine", "torch-save"}
    assert engines["torch-save"][-1] == engines["ckptengine"][-1] == "equal"
    assert shown["stall"].text().count("\n") > 6
    assert shown["stall"].markdown().startswith("**stall")


def test_the_page_is_generated_and_checked(
    result: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results, docs = tmp_path / "results", tmp_path / "docs"
    results.mkdir()
    docs.mkdir()
    (results / "2026-01-01-machine.json").write_text(json.dumps(result["document"]))
    sweep = {"schema": 1, "sweep": "simulated", "points": [{"value": 4, "document": result["document"]}]}
    sweep["points"][0]["document"] = {
        **result["document"], "options": {**result["document"]["options"], "workloads": ["metadata"]}
    }  # fmt: skip
    (results / "2026-01-02-curve.json").write_text(json.dumps(sweep))
    monkeypatch.setattr(report, "RESULTS", results)
    monkeypatch.setattr(report, "DOCS", docs)
    monkeypatch.setattr(report, "PAGE", docs / "benchmarks.md")
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{report.SHORT}old\n{report.SHORT}after\n")
    monkeypatch.setattr(report, "README", readme)
    monkeypatch.setattr(short, "SIZE", "tiny")
    assert report.main(["--check"]) == 1
    assert report.main([]) == 0
    assert report.main(["--check"]) == 0
    text = (docs / "benchmarks.md").read_text()
    assert "2026-01-01-machine" in text
    assert "Where a rival is better than ours" in text
    before, table, after = readme.read_text().split(report.SHORT)
    assert (before, after) == ("before\n", "after\n")
    assert "| ckptengine |" in table
    assert table in text
    assert sorted(path.name for path in (docs / "pictures").iterdir()) == [
        "2026-01-01-machine.png",
        "2026-01-02-curve.png",
    ]
    assert set(curves.curve(sweep)) == {"ckptengine"}


def test_the_published_page_is_what_the_results_give() -> None:
    assert report.main(["--check"]) == 0


def test_a_picture_without_stall(result: dict[str, Any], tmp_path: Path) -> None:
    document = dict(result["document"])
    figures = {"state_bytes": 5, "saves": [{"durable_s": 1.5}, {"durable_s": 2.5}]}
    document["samples"] = [
        {"job": {"workload": "durable", "engine": engine}, "result": {"status": "ok", "figures": figures}}
        for engine in ("ckptengine", "torch-save")
    ]
    draw(document, tmp_path / "bars.png")
    assert (tmp_path / "bars.png").stat().st_size > 5_000


@pytest.mark.parametrize(
    "argv",
    [["--workload", "flight"], ["--rivals", "nobody"], ["--ranks", "1"], ["--simulated", "3"], ["--steps", "0"]],
)
def test_bad_arguments_end_in_one_line_and_status_2(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--tiny", *argv]) == 2
    written = capsys.readouterr().err
    assert written.startswith("ckptengine bench: ")
    assert written.count("\n") == 1


def test_a_file_that_is_no_result(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text('{"schema": 99}')
    with pytest.raises(UnreadableFormat):
        load(tmp_path / "x.json")


def test_sizes_are_read() -> None:
    assert [arguments.size_bytes(text) for text in ("5", "1K", "1.5GiB", "2m")] == [5, 1024, 3 << 29, 2 << 20]


def test_runs_contradict_each_other_only_where_both_tell_engines_apart(result: dict[str, Any], tmp_path: Path) -> None:
    pairs = {("a", "b"): -1, ("a", "c"): 0, ("b", "c"): 1}
    assert agree.contradictions(pairs, {**pairs, ("a", "c"): 1}) == []
    assert agree.contradictions(pairs, {**pairs, ("a", "b"): 1, ("b", "c"): 0}) == ["a and b change places"]
    (tmp_path / "one.json").write_text(json.dumps(result["document"]))
    assert agree.main([str(tmp_path / "one.json")] * 2) == 0
    assert agree.main([str(tmp_path / "none.json")]) == 2


def test_two_runs_that_swap_two_engines_contradict_each_other(result: dict[str, Any], tmp_path: Path) -> None:
    def run(name: str, seconds: dict[str, float]) -> str:
        samples = [
            {"job": {"workload": "durable", "engine": engine},
             "result": {"status": "ok", "figures": {"saves": [{"call_s": 1.0, "durable_s": value}] * 4}}}
            for engine, value in seconds.items()
        ]  # fmt: skip
        (tmp_path / name).write_text(json.dumps({**result["document"], "samples": samples}))
        return str(tmp_path / name)

    first, second = run("a", {"x": 1.0, "y": 2.0}), run("b", {"x": 2.0, "y": 1.0})
    assert agree.main([first, second]) == 1
    assert agree.main([first, first]) == 0
