"""Processors of families that also take videos, for machines that lack what only their videos need."""

from __future__ import annotations

from functools import cache
from typing import Any

from transformers import AutoProcessor
from transformers.utils.import_utils import is_torchvision_available


def picture_processor(processor_class: Any) -> Any:  # noqa: ANN401 - a class with `from_pretrained`
    """Return what loads a processor: transformers' own choice, or without its video part where torchvision lacks.

    transformers refuses to load a processor whose video part needs torchvision, even for pictures alone.
    """
    return AutoProcessor if is_torchvision_available() else without_video(processor_class)


@cache
def without_video(processor_class: Any) -> type[Any]:  # noqa: ANN401 - a class
    """Return the same processor class without its video part, under the same name so that what it saves is the same.

    It takes and saves what the class itself does; the class must take its image part and tokenizer first.
    """

    def get_attributes(cls: type[Any]) -> list[str]:
        parts: list[str] = processor_class.get_attributes()
        return [name for name in parts if name != "video_processor"]

    added = {"get_attributes": classmethod(get_attributes), "__doc__": processor_class.__doc__}
    return type(processor_class.__name__, (processor_class,), added)
