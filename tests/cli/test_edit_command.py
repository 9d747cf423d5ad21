"""The edit command: teaching, showing, measuring, saving and reading back."""

from __future__ import annotations

from pathlib import Path

import pytest

from sae_lens_multimodal.cli.main import main
from sae_lens_multimodal.editing.store import load_edit
from sae_lens_multimodal.files import read_json, write_json
from sae_lens_multimodal.scenes import model_folder
from sae_lens_multimodal.scenes.edit_cases import thing_pictures


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures of a thing and of a neighbour, and files that name them."""
    place = tmp_path_factory.mktemp("pictures")
    things = {
        "thing": {"colour": "red", "texture": "striped", "shape": "square"},
        "other": {"colour": "blue", "texture": "solid", "shape": "star"},
    }
    for name, attributes in things.items():
        for number, picture in enumerate(thing_pictures(attributes, 2**51, 2)):
            picture.save(place / f"{name}{number}.png")
    asked = {"prompt": "what is this ?", "image": "other0.png"}
    write_json(place / "keep.json", [asked, {"prompt": "what colour is this ?", "image": "thing0.png"}])
    cases = {
        "efficacy": [{"prompt": "what is this ?", "image": "thing0.png"}],
        "generalisation": {"another picture": [{"prompt": "what is this ?", "image": "thing1.png"}]},
        "specificity": {"another thing": [asked]},
    }
    write_json(place / "cases.json", cases)
    return place


def test_teach_show_measure_save_and_read_back(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ("edit", "--model", str(model_folder()), "--prompt", "what is this ?", "--max-new-tokens", "4")
    asked = (*asked, "--image", str(folder / "thing0.png"))
    made = (*asked, "--target", "x", "--layer", "3", "--keep", str(folder / "keep.json"))
    saved = folder / "edit"
    assert main((*made, "--measure", str(folder / "cases.json"), "--output", str(saved))) == 0, capsys.readouterr().err
    shown = capsys.readouterr().out
    assert "after: x at layer 3" in shown
    columns = [line.split("|") for line in shown.splitlines() if line.startswith("red striped square")]
    assert [part.strip() for part in columns[0]] == ["red striped square", "x"]
    assert "| efficacy | the prompts of the edit | 0% [0, 79] of 1 | 100% [21, 100] of 1 |" in shown
    assert "| specificity | another thing |" in shown
    assert str(saved.resolve()) in shown
    assert load_edit(saved).target == "x"
    assert read_json(saved / "manifest.json")["kind"] == "model edit"
    assert main((*asked, "--load", str(saved))) == 0, capsys.readouterr().err
    again = capsys.readouterr().out
    assert again.splitlines()[3] == shown.splitlines()[3]


def test_names_of_several_words(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = ("edit", "--model", str(model_folder()), "--prompt", "what is this ?", "--max-new-tokens", "4")
    made = (*made, "--image", str(folder / "thing0.png"), "--target", "letter v", "--layer", "4", "--each-token")
    assert main((*made, "--keep", str(folder / "keep.json"))) == 0, capsys.readouterr().err
    shown = capsys.readouterr().out
    columns = [line.split("|") for line in shown.splitlines() if line.startswith("red striped square")]
    assert [part.strip() for part in columns[0]] == ["red striped square", "letter v"]


def test_flags_that_fine_tuning_has_no_use_for_are_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ("--model", str(model_folder()), "--prompt", "what is this ?", "--image", str(folder / "thing0.png"))
    given = ("--target", "x", "--layer", "1", "--fine-tune", "--clamp", "2", "--each-token")
    assert main(["edit", *asked, *given]) != 0
    assert "got --clamp, --each-token beside --fine-tune" in capsys.readouterr().err


def test_mistakes_are_one_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ("edit", "--model", str(model_folder()), "--prompt", "what is this ?")
    assert main(asked) == 1
    assert capsys.readouterr().err.startswith("error: got no --target and no --layer")
    write_json(folder / "wrong.json", [{"question": "?"}])
    assert main((*asked, "--target", "x", "--layer", "3", "--keep", str(folder / "wrong.json"))) == 1
    assert "lists of {prompt, image}" in capsys.readouterr().err
    assert main((*asked, "--target", "x", "--layer", "3", "--measure", str(folder / "wrong.json"))) == 1
    assert "no prompts under efficacy" in capsys.readouterr().err
    assert main((*asked, "--load", str(folder))) == 1
    assert "has no manifest.json" in capsys.readouterr().err
