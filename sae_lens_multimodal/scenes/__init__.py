"""A synthetic world with known objects, and a tiny real LLaVA-NeXT trained on it; importing this costs nothing."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sae_lens_multimodal.scenes.folder import model_folder
    from sae_lens_multimodal.scenes.rows import scene_rows, scenes_dataset
    from sae_lens_multimodal.scenes.words import ATTRIBUTES, COLOURS, GLYPHS, SHAPES, TEXTURES, attribute_of
    from sae_lens_multimodal.scenes.world import Scene, SceneObject, make_scene

_HOMES = {
    "ATTRIBUTES": "words",
    "COLOURS": "words",
    "GLYPHS": "words",
    "SHAPES": "words",
    "TEXTURES": "words",
    "attribute_of": "words",
    "Scene": "world",
    "SceneObject": "world",
    "make_scene": "world",
    "scene_rows": "rows",
    "scenes_dataset": "rows",
    "model_folder": "folder",
}

__all__ = [
    "ATTRIBUTES",
    "COLOURS",
    "GLYPHS",
    "SHAPES",
    "TEXTURES",
    "Scene",
    "SceneObject",
    "attribute_of",
    "make_scene",
    "model_folder",
    "scene_rows",
    "scenes_dataset",
]


def __getattr__(name: str) -> Any:  # noqa: ANN401 - a module attribute may be anything
    """Import a public name when it is first asked for."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    """List the public names."""
    return sorted(__all__)
