"""The example package adds a family through its entry point, and the contract holds for it."""

from __future__ import annotations

import importlib
import re
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch

from sae_lens_multimodal.adapters import registry
from sae_lens_multimodal.adapters.model import VisionLanguageModel, load_model
from tests.adapters import test_family_contract as contract
from tests.adapters import test_family_places as places
from tests.adapters import test_family_uses as uses

EXAMPLE = Path(__file__).parents[2] / "examples" / "third_party_family"


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The example as an installer would leave it: its module, and the entry points that its pyproject names."""
    project = tomllib.loads((EXAMPLE / "pyproject.toml").read_text())
    (group,) = project["project"]["entry-points"]
    assert group == registry.ENTRY_POINT_GROUP
    site = tmp_path / "site-packages"
    info = site / f"{project['project']['name'].replace('-', '_')}-{project['project']['version']}.dist-info"
    info.mkdir(parents=True)
    info.joinpath("METADATA").write_text(f"Name: {project['project']['name']}\nVersion: 0.1.0\n")
    ((name, target),) = project["project"]["entry-points"][group].items()
    info.joinpath("entry_points.txt").write_text(f"[{group}]\n{name} = {target}\n")
    for module in project["tool"]["setuptools"]["py-modules"]:
        (site / f"{module}.py").write_bytes((EXAMPLE / f"{module}.py").read_bytes())
    monkeypatch.syspath_prepend(site)
    monkeypatch.delitem(sys.modules, "slm_deepseek_vl", raising=False)
    importlib.invalidate_caches()
    return str(name)


def test_it_is_found_and_holds_the_contract(installed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert installed in registry.registered_families()
    family = registry.find_family(installed)
    module, processor = family.random_model(seed=0)
    module.set_attn_implementation("eager")
    plain: Any = family.random_model(seed=0)[0]
    plain.set_attn_implementation("eager")
    model: VisionLanguageModel = load_model(module, processor=processor)
    assert type(model.family).__module__ == "slm_deepseek_vl"
    with torch.no_grad():
        contract.test_the_hooks_that_everyone_relies_on(model)
        contract.test_values_are_those_of_plain_hooks_bit_for_bit(model, plain)
        contract.test_a_batch_gives_what_each_prompt_gives_alone(model, "left")
        contract.test_each_invoke_sees_its_own_rows(model)
        contract.test_layouts_of_many_prompts(model)
    places.test_image_tokens_are_where_the_model_puts_pictures(model)
    for size in ((61, 40), (12, 90)):
        assert not any(places.check_places(model, size).inexact[0])
    places.test_the_structures_of_released_checkpoints(installed, family.released[0])
    uses.test_steering_is_a_plain_hook(model)
    uses.test_a_saved_folder_loads_and_is_the_same_model(model, tmp_path / "model", monkeypatch)


def test_the_guide_shows_the_example_as_it_is() -> None:
    guide = (EXAMPLE.parents[1] / "docs" / "adding_a_family.md").read_text()
    shown = re.findall(r"```(?:python|toml)\n(.*?)```", guide, flags=re.DOTALL)
    files = [path.read_text() for path in EXAMPLE.iterdir() if path.is_file()]
    assert len(shown) == 5
    assert [block for block in shown if not any(block in text for text in files)] == []


def test_the_example_is_short() -> None:
    lines = [line for path in EXAMPLE.iterdir() if path.is_file() for line in path.read_text().splitlines()]
    assert len(lines) < 100
