"""The commands report and export: what they read by themselves, and what they refuse."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from sae_lens_multimodal.autointerp.explain import explain
from sae_lens_multimodal.autointerp.judges import ScriptedJudge
from sae_lens_multimodal.autointerp.measures import measure
from sae_lens_multimodal.autointerp.score import score
from sae_lens_multimodal.autointerp.scorers.embedding import EmbeddingScorer
from sae_lens_multimodal.cli.main import main
from sae_lens_multimodal.errors import StoreError
from sae_lens_multimodal.features.store import FeatureStore
from sae_lens_multimodal.files import read_json, write_json
from sae_lens_multimodal.report.runs import read_run
from tests.report.report_sample import write_store


def judged(store: FeatureStore, folder: Path, answer: str) -> None:
    """Explain, score and measure into a folder, as the commands do."""
    reply = json.dumps({"common": True, "label": answer, "explanation": f"It is {answer}."})
    explainer = ScriptedJudge(lambda _: reply, name=answer)
    found = explain(store, explainer, output=folder / "explanations", features=[0, 1], modality="image", progress=False)
    judge = ScriptedJudge(lambda _: '{"answer": "yes"}', name=f"judge of {answer}")
    score(store, judge, found, output=folder / "scores", progress=False)
    measure(store, found, [EmbeddingScorer(None)], output=folder / "measures", progress=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with results in it, and another run beside it."""
    folder = tmp_path_factory.mktemp("reporting")
    store = write_store(folder / "store", n_pictures=16)
    judged(store, folder / "store", "round")
    judged(store, folder / "other", "square")
    return folder


def run(*arguments: str | Path) -> int:
    return main([str(one) for one in arguments])


def test_a_report_reads_what_is_in_the_store(folder: Path, tmp_path: Path) -> None:
    assert run("report", folder / "store", "--output", tmp_path / "out", "--features", "0-1", "--examples", "2") == 0
    page = (tmp_path / "out" / "features" / "0.html").read_text(encoding="utf-8")
    assert "It is round." in page and "Verdicts" in page and "judge of round" in page
    assert "no CLIP or SigLIP was given" in page, "the note of a measure"
    assert "Description: It is round." in page, "the question, word for word"
    assert not (tmp_path / "out" / "compare.html").exists()


def test_runs_are_compared(folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    scores = folder / "other" / "scores"
    compare = ("--compare", f"squares={folder / 'other'}", "--compare", f"another judge={scores}")
    assert run("report", folder / "store", "--output", output, "--name", "rounds", *compare) == 0
    page = (output / "compare.html").read_text(encoding="utf-8")
    assert "squares against rounds" in page and "another judge against rounds" in page
    assert "It is square." in (output / "features" / "1.html").read_text(encoding="utf-8")


def test_processes_make_the_same_report(folder: Path, tmp_path: Path) -> None:
    for name, workers in (("one", "1"), ("two", "2")):
        arguments = ("--output", tmp_path / name, "--examples", "2", "--workers", workers)
        assert run("report", folder / "store", *arguments) == 0
    files = {path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*") if path.is_file()}
    assert files == {path.relative_to(tmp_path / "two") for path in (tmp_path / "two").rglob("*") if path.is_file()}
    for path in files - {Path("manifest.json")}:
        assert (tmp_path / "one" / path).read_bytes() == (tmp_path / "two" / path).read_bytes(), path


def test_exports_are_written(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table, export = tmp_path / "all.parquet", tmp_path / "np"
    compare = ("--compare", f"squares={folder / 'other'}")
    assert run("export", folder / "store", "--table", table, "--neuronpedia", export, *compare) == 0
    assert capsys.readouterr().out.split() == [str(table), str(export / "sample" / "2-multimodal")]
    rows = {row["feature"]: row for row in pq.read_table(table).to_pylist()}
    assert [(one["run"], one["text"]) for one in rows[0]["explanations"]] == [
        ("this run", "It is round."), ("squares", "It is square."),
    ]  # fmt: skip
    assert {one["judge"] for one in rows[0]["verdicts"]} == {"judge of round", "judge of square"}
    assert (export / "sample" / "2-multimodal" / "explanation_scores" / "batch-0.jsonl.gz").is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("export",), "give --table FILE, --neuronpedia FOLDER or both"),
        (("report", "--output", "x", "--compare", "y"), "expected NAME=FOLDER"),
        (("report", "--output", "x", "--compare", "a=/nowhere"), "does not exist"),
        (("report", "--output", "x", "--scores", "/nowhere"), "does not exist"),
        (("export", "--table", "x", "--compare", "a=tests"), "holds no explanations, scores or measures"),
    ],
)
def test_mistakes_are_one_clear_line(
    folder: Path, arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(arguments[0], folder / "store", *arguments[1:]) != 0
    error = capsys.readouterr().err
    assert message in error and len(error.strip().split("\n")) == 1


def test_results_of_another_sae_are_refused(folder: Path, tmp_path: Path) -> None:
    store = FeatureStore.open(folder / "store")
    judged(store, tmp_path / "run", "odd")
    manifest = read_json(tmp_path / "run" / "scores" / "manifest.json")
    manifest["settings"]["store"]["d_sae"] = 99
    write_json(tmp_path / "run" / "scores" / "manifest.json", manifest)
    with pytest.raises(StoreError, match="its features are others"):
        read_run([tmp_path / "run"], store=store)
    assert len(read_run([tmp_path / "run"]).scores) == 4
