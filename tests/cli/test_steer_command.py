"""The steer command: answers side by side, places, and a dose curve with its page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens import TopKSAE, TopKSAEConfig

from sae_lens_multimodal.cli.main import build_parser, main
from sae_lens_multimodal.cli.options import parse_changes
from sae_lens_multimodal.cli.steering import place_of, side_by_side
from sae_lens_multimodal.errors import ConfigError
from sae_lens_multimodal.files import read_json
from sae_lens_multimodal.hooks.changes import Ablate, Set
from sae_lens_multimodal.hooks.dose_curve import DoseCurve
from sae_lens_multimodal.hooks.places import BoxTokens, ImageTokens
from sae_lens_multimodal.scenes import make_scene, model_folder


@pytest.fixture(scope="module")
def sae_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    d_in = read_json(model_folder() / "config.json")["text_config"]["hidden_size"]
    sae = TopKSAE(TopKSAEConfig(d_in=d_in, d_sae=32, k=4))
    sae.cfg.metadata.hook_name = "blocks.0.hook_resid_post"
    with torch.no_grad():
        sae.W_dec.copy_(torch.randn(sae.W_dec.shape, generator=torch.Generator().manual_seed(0)))
    folder = tmp_path_factory.mktemp("sae")
    sae.save_model(folder)
    return folder


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("picture") / "x.png"
    make_scene(3).image.save(path)
    return path


def parsed(*arguments: str) -> Any:
    return build_parser().parse_args(["steer", "M", "S", "--prompt", "?", *arguments])


def test_the_feature_may_be_given_once() -> None:
    assert parse_changes(parsed("--feature", "12", "--set", "8")) == {12: Set(8.0)}
    assert parse_changes(parsed("--feature", "12", "--ablate")) == {12: Ablate()}
    assert parse_changes(parsed("--feature", "12", "--set", "3=8", "--ablate", "4")) == {3: Set(8.0), 4: Ablate()}


def test_places() -> None:
    assert place_of(parsed()) == "all"
    assert place_of(parsed("--picture", "1")) == ImageTokens(1)
    assert place_of(parsed("--box", "1,2,3,4.5", "--picture", "1")) == BoxTokens((1.0, 2.0, 3.0, 4.5), image=1)
    with pytest.raises(ConfigError, match="give one of them"):
        place_of(parsed("--picture", "1", "--tokens", "image"))
    for wrong in ("1,2,3", "a,b,c,d"):
        with pytest.raises(ConfigError, match="--box got"):
            place_of(parsed("--box", wrong))


def test_columns_stand_beside_one_another() -> None:
    lines = side_by_side("a b " * 30, "c", "12 set to 8")
    assert lines[0].startswith("before: as it is")
    assert "after: 12 set to 8" in lines[0]
    assert len({line.index("|") for line in lines}) == 1
    assert " ".join(line.split("|")[0].strip() for line in lines[2:]) == ("a b " * 30).strip()


def test_answers_and_a_dose_curve(
    sae_folder: Path, picture: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ("--image", str(picture), "--prompt", "is there a red circle ?", "--feature", "3")
    names = ("steer", str(model_folder()), str(sae_folder))
    assert main((*names, *asked, "--set", "8", "--max-new-tokens", "3")) == 0, capsys.readouterr().err
    shown = capsys.readouterr().out
    assert "before: as it is" in shown
    assert "after: 3 set to 8" in shown
    page = tmp_path / "page"
    dose = ("--target", "yes", "--dose", "0,5,40", "--unit", "1", "--output", str(page))
    assert main((*names, *asked, *dose)) == 0, capsys.readouterr().err
    shown = capsys.readouterr().out
    assert "P(yes)" in shown and "ablated" in shown
    (curve,) = (DoseCurve.from_dict(one) for one in read_json(page / "dose.json"))
    assert [point.strength for point in curve.points] == [0.0, 5.0, 40.0]
    html = (page / "index.html").read_text(encoding="utf-8")
    assert html.count("<circle") == 6
    assert (page / "static" / "report.css").is_file()
    for wrong, message in (
        (("--set", "8", "--box", "0,0,9999,9"), "outside of image 0"),
        (("--feature", "99", "--set", "8"), "expected an integer from 0 to 31"),
        (("--set", "nan"), "finite number"),
        ((*dose, "--set", "8"), "got --set, which would do nothing"),
        (("--set", "8", "--dose", "1,2"), "got --dose, which would do nothing"),
        ((*dose, "--store", str(tmp_path)), "got --unit, which would do nothing"),
    ):
        assert main((*names, *asked, *wrong)) == 1
        assert message in capsys.readouterr().err
    assert main(("steer", "--prompt", "?", "--set", "1=2")) == 1
    assert "no model or no SAE" in capsys.readouterr().err
