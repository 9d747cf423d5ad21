"""The package as a whole: lazy, whole, and laid out as documented."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import sae_lens_multimodal
from sae_lens_multimodal import errors

ROOT = Path(__file__).resolve().parent.parent
HEAVY = ("torch", "transformers", "nnsight", "sae_lens", "datasets", "numpy", "PIL")


def heavy_modules_after(code: str) -> list[str]:
    script = f"{code}\nimport sys\nprint([name for name in {HEAVY!r} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return ast.literal_eval(result.stdout.strip().splitlines()[-1])


def test_import_is_lazy() -> None:
    assert heavy_modules_after("import sae_lens_multimodal; dir(sae_lens_multimodal)") == []


def test_help_imports_nothing_heavy() -> None:
    code = "from sae_lens_multimodal.cli.main import build_parser; build_parser().format_help()"
    assert heavy_modules_after(code) == []


def test_every_public_name_resolves_to_where_the_type_checker_sees_it() -> None:
    tree = ast.parse(Path(sae_lens_multimodal.__file__).read_text(encoding="utf-8"))
    typed = {
        alias.name: node.module
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("sae_lens_multimodal.")
        for alias in node.names
    }
    assert sorted(typed) == sae_lens_multimodal.__all__
    for name, module in typed.items():
        value = getattr(sae_lens_multimodal, name)
        assert value.__module__ == module, name


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = sae_lens_multimodal.no_such_name


@pytest.mark.parametrize("folder", ["adapters", "hooks"])
def test_top_level_folders_are_links_into_the_package(folder: str) -> None:
    link = ROOT / folder
    assert link.is_symlink()
    assert link.resolve() == ROOT / "sae_lens_multimodal" / folder


def test_the_readme_lists_the_public_names() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    section = readme.split("## All public names")[1].split("##")[0]
    assert sorted(re.findall(r"`(\w+)`", section)) == sae_lens_multimodal.__all__


def test_every_dependency_is_in_the_readme() -> None:
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    names = [requirement.split(">")[0].split("[")[0] for requirement in project["dependencies"]]
    assert [name for name in names if f"| {name} |" not in readme] == []


def test_errors_form_one_tree() -> None:
    found = [value for value in vars(errors).values() if isinstance(value, type)]
    assert all(issubclass(value, errors.MultimodalError) for value in found)
    assert str(errors.UnknownHookError("no hook 'x'")) == "no hook 'x'"
