"""The trace command prints what the public functions find, and asks for one corruption."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sae_lens_multimodal.cli.main import main
from sae_lens_multimodal.files import read_json
from sae_lens_multimodal.scenes import model_folder
from sae_lens_multimodal.scenes.constraints import ConstraintCase, constraint_cases, twin
from tests.hooks.hook_samples import build_sae


@pytest.fixture
def case() -> ConstraintCase:
    return constraint_cases(1)[0]


@pytest.fixture
def arguments(tmp_path: Path, case: ConstraintCase) -> list[str]:
    case.scene.image.save(tmp_path / "scene.png")
    return [
        "trace",
        *("--model", str(model_folder())),
        *("--image", str(tmp_path / "scene.png")),
        *("--prompt", case.clean.question),
        *("--answer", str(case.clean.answer)),
    ]


def test_cells_are_printed_and_the_page_is_written(
    arguments: list[str], case: ConstraintCase, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    more = [
        "--constraint",
        case.word,
        "--replace",
        case.other_word,
        "--parts",
        "resid",
        "--top",
        "3",
        "--tokens",
        "text",
    ]
    assert main([*arguments, *more, "--output", str(tmp_path / "page")]) == 0
    printed = capsys.readouterr().out.splitlines()
    stored = read_json(tmp_path / "page" / "trace.json")[case.clean.question]
    assert printed[0] == f"answer: {case.clean.answer}"
    assert printed[1].startswith(f"probability: clean {stored['clean']['probability']:.4g}, corrupted ")
    first = printed[printed.index("restored  part      layer  token") + 1].split()
    assert first[1:] == ["resid", "0", case.word, "(a", "corrupted", "token)"]
    assert float(first[0]) == pytest.approx(1.0, abs=0.01)
    assert printed[-1] == str((tmp_path / "page" / "index.html").resolve())


def test_features_of_the_hot_cell_are_named(
    arguments: list[str], case: ConstraintCase, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    hook = "blocks.1.hook_resid_post"
    build_sae(d_in=160, metadata={"hook_name": hook}).save_model(tmp_path / "sae")
    explanations = tmp_path / "explanations"
    explanations.mkdir()
    lines = [json.dumps({"feature": feature, "text": f"meaning {feature}"}) for feature in range(96)]
    (explanations / "explanations.jsonl").write_text("\n".join(lines) + "\n")
    more = ["--other-prompt", case.counterfactual.question, "--against", str(case.counterfactual.answer)]
    more += ["--sae", str(tmp_path / "sae"), "--features", "2", "--tokens", "text"]
    more += ["--explanations", str(explanations / "explanations.jsonl")]
    twin(case).image.save(tmp_path / "twin.png")
    assert main([*arguments, *more, "--held-out", str(tmp_path / "twin.png")]) == 0
    printed = capsys.readouterr().out.splitlines()
    at = next(at for at, line in enumerate(printed) if line.startswith("feature  "))
    for line in printed[at + 1 : at + 3]:
        assert line.split()[-2:] == ["meaning", line.split()[0]]
    assert printed[at + 3].startswith("together")
    assert printed[at + 4].startswith("  random, weight")
    assert printed[at + 5].startswith("held out 1")
    best, hottest = printed[at - 4], printed[at - 3]
    assert "corrupted token" not in best
    assert hottest.endswith("(a corrupted token)")
    assert any(line.startswith("logit_difference: clean") for line in printed)
    assert "at mean" not in printed[at]
    assert main([*arguments, *more, "--reference", str(tmp_path / "twin.png"), "--output", str(tmp_path / "page")]) == 0
    printed = capsys.readouterr().out.splitlines()
    at = next(at for at, line in enumerate(printed) if line.startswith("feature  "))
    assert printed[at].endswith("at mean  explanation")
    means = read_json(tmp_path / "page" / "trace.json")[case.clean.question]["together"]["mean_ablated"]
    assert float(printed[at + 3].split()[-1]) == pytest.approx(means["found"], abs=6e-4)
    assert [line.split(" at mean")[0].strip() for line in printed[at + 5 : at + 8]] == [
        "all others",
        "all features",
        "value",
    ]
    assert float(printed[at + 7].split()[-1]) == pytest.approx(means["value"], abs=6e-4)
    assert len(printed[at + 7]) == len(printed[at + 3])


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ((), "got none"),
        (("--noise", "3", "--other-prompt", "x"), "got other_prompt, noise"),
        (("--replace", "blue"), "one way to corrupt"),
        (("--blank", "1,2,3"), "X0,Y0,X1,Y1"),
        (("--constraint", "purple thing", "--replace", "blue"), "do not stand"),
        (("--noise", "3", "--parts", "everything"), "Got the part 'everything'"),
        (("--blank", "1,2,30,40", "--picture", "1"), "--picture got 1"),
    ],
)
def test_mistakes_cost_one_line(
    more: tuple[str, ...], message: str, arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*arguments, *more]) == 1
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_explanations_and_held_out_pictures_belong_to_something(
    arguments: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for layer in (1, 2):
        build_sae(d_in=160, metadata={"hook_name": f"blocks.{layer}.hook_resid_post"}).save_model(tmp_path / str(layer))
    both = ["--sae", str(tmp_path / "1"), "--sae", str(tmp_path / "2"), "--noise", "3"]
    assert main([*arguments, *both, "--explanations", str(tmp_path)]) == 1
    assert "1 --explanations for 2 --sae" in capsys.readouterr().err.splitlines()[-1]
    assert main([*arguments, *both[:2], "--blank", "1,2,30,40", "--held-out", "x.png"]) == 1
    assert "--held-out asks the same of another picture" in capsys.readouterr().err.splitlines()[-1]
