"""Families are found by model type, built in or from an entry point."""

from __future__ import annotations

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


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (
            "no_such_module:Whale",
            r"whale = 'no_such_module:Whale' cannot be imported: No module named",
        ),
        ("sae_lens_multimodal.adapters.llava_next:Whale", r"cannot be imported: .*has no attribute 'Whale'"),
        ("sae_lens_multimodal.adapters.registry:GENERIC", r"is 'generic'; expected a subclass of .*Family"),
        ("pathlib:Path", r"expected a subclass of .*Family: see docs/adding_a_family\.md"),
    ],
)
def test_entry_points_that_give_no_family_say_so(monkeypatch: pytest.MonkeyPatch, target: str, message: str) -> None:
    entry = EntryPoint("whale", target, registry.ENTRY_POINT_GROUP)
    monkeypatch.setattr(registry, "entry_points", lambda **_: [entry])
    # others are as they were
    assert registry.find_family("llava_next") is LlavaNext
    with pytest.raises(ConfigError, match=message):
        registry.find_family("whale")


def test_a_family_is_registered_once() -> None:
    registry.registered_families()
    with pytest.raises(ConfigError, match="twice"):
        registry.family("llava_next")(lambda: LlavaNext)


def test_listing_families_imports_no_adapter(monkeypatch: pytest.MonkeyPatch) -> None:
    names = registry.registered_families(built_in=True)
    for module in {registry.find_family(name).__module__ for name in names}:
        # to import it would now fail
        monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.delitem(sys.modules, "sae_lens_multimodal.adapters.families")
    monkeypatch.setattr(registry, "_factories", {})
    assert registry.registered_families(built_in=True) == names
    with pytest.raises(ImportError):
        registry.find_family("llava_next")
