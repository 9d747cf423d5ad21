"""Processors as they are used here: without a video part where that lacks, and with the settings that prompts get."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

from transformers import AutoProcessor
from transformers.utils.import_utils import is_torchvision_available

from sae_lens_multimodal.errors import LayoutError


class PictureProcessor:
    """Loads transformers' own choice of processor, or one for pictures alone where videos cannot be."""

    def __init__(self, pictures: Any, *, whole: bool) -> None:  # noqa: ANN401 - a class with `from_pretrained`
        """Keep the class for pictures alone, and whether this machine has what the whole processor needs."""
        self.pictures = pictures
        self.whole = whole

    def from_pretrained(self, name: str, **kwargs: Any) -> Any:  # noqa: ANN401 - transformers' own
        """Load a processor."""
        if self.whole:
            try:
                return AutoProcessor.from_pretrained(name, **kwargs)
            except (OSError, ValueError) as error:
                # a folder that was saved where videos could not be has no such part
                if "video processor" not in str(error):
                    raise
        return self.pictures.from_pretrained(name, **kwargs)


def picture_processor(processor_class: Any) -> PictureProcessor:  # noqa: ANN401 - a class with `from_pretrained`
    """Return what loads a processor: transformers' own choice, or without its video part where torchvision lacks.

    transformers refuses to load a processor whose video part needs torchvision, even for pictures alone.
    """
    return PictureProcessor(without_video(processor_class), whole=is_torchvision_available())


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


def image_settings(processor: Any) -> Any:  # noqa: ANN401 - transformers' own
    """Return the image processor with the settings that prompts are encoded with: `processor.images_kwargs` win.

    Raises:
        LayoutError: pictures would not be resized although they have to be, or be cropped to no size.
    """
    images, own = processor.image_processor, dict(getattr(processor, "images_kwargs", {}))
    if own and hasattr(images, "_standardize_kwargs"):
        given = {name: own.get(name, getattr(images, name, None)) for name in {*images._valid_kwargs_names, *own}}
        images = copy.copy(images)
        # sizes may be written in several ways; this is how the image processor itself reads them
        for name, value in images._standardize_kwargs(**given).items():
            setattr(images, name, value)
    if getattr(images, "do_center_crop", False) and not getattr(images, "crop_size", None):
        raise LayoutError("the image processor is to crop, but has no crop_size; set it, or do_center_crop to False.")
    return images
