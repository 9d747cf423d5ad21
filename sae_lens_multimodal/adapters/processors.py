"""Processors of families that also take videos, for machines that lack what only their videos need."""

from __future__ import annotations

from functools import cache
from typing import Any

from transformers import AutoProcessor
from transformers.utils import is_torchvision_available


def picture_processor(processor_class: type[Any]) -> Any:  # noqa: ANN401 - a class with `from_pretrained`
    """Return what loads a processor: transformers' own choice, or without its video part where torchvision lacks.

    transformers refuses to load a processor whose video part needs torchvision, even for pictures alone.
    """
    return AutoProcessor if is_torchvision_available() else without_video(processor_class)


@cache
def without_video(processor_class: type[Any]) -> type[Any]:
    """Return the same processor class without its video part, under the same name so that what it saves is the same."""

    def __init__(
        self: Any,  # noqa: ANN401
        image_processor: Any = None,  # noqa: ANN401
        tokenizer: Any = None,  # noqa: ANN401
        chat_template: str | None = None,
        **kwargs: Any,  # noqa: ANN401
    ) -> None:
        processor_class.__init__(self, image_processor, tokenizer, None, chat_template=chat_template, **kwargs)

    return type(
        processor_class.__name__, (processor_class,), {"__init__": __init__, "__doc__": processor_class.__doc__}
    )
