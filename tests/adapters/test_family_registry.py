"""Families are found by model type, built in or from an entry point."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import EntryPoint
from typing import Any

import pytest

from sae_lens_multimodal.adapters import registry
from sae_lens_multimodal.adapters.family import Family
from sae_lens_multimodal.adapters.llava_next import LlavaNext
from sae_lens_multimodal.errors import ConfigError, UnsupportedModelError


def test_built_in_families() -> None:
    assert "llava_next" in registry.registered_families()
    assert registry.find_family("llava_next") is LlavaNext


def test_every_family_says_its_own_model_type(family_name: str) -> None:
    found = registry.find_family(family_name)
    assert issubclass(found, Family)
    assert found.model_type == family_name


def test_an_unknown_family_lists_the_known_ones() -> None:
    with pytest.raises(UnsupportedModelError, match=r"'whale'.*llava_next") as caught:
        registry.find_family("whale", name="sea/whale")
    assert "sea/whale" in str(caught.value)


def test_entry_points_add_families_but_do_not_replace(monkeypatch: pytest.MonkeyPatch) -> None:
    target = "sae_lens_multimodal.adapters.llava_next:LlavaNext"
    entries = [
        EntryPoint("whale", target, registry.ENTRY_POINT_GROUP),
        EntryPoint("llava_next", "nowhere:Nothing", registry.ENTRY_POINT_GROUP),
    ]

    def found(**select: Any) -> list[EntryPoint]:
        assert select == {"group": "sae_lens_multimodal.adapters"}
        return entries

    monkeypatch.setattr(registry, "entry_points", found)
    assert "whale" in registry.registered_families()
    assert registry.find_family("whale") is LlavaNext
    assert registry.find_family("llava_next") is LlavaNext


def test_a_family_is_registered_once() -> None:
    registry.registered_families()
    with pytest.raises(ConfigError, match="twice"):
        registry.family("llava_next")(lambda: LlavaNext)


def test_listing_families_imports_no_adapter() -> None:
    program = (
        "import sys; from sae_lens_multimodal.adapters.registry import registered_families as names; "
        "assert 'llava_next' in names(); assert 'sae_lens_multimodal.adapters.llava_next' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
