"""Masks of what an explanation names, from text-to-mask models of transformers: SAM 3, or Grounding DINO and SAM."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, final

import numpy as np
import torch
from jaxtyping import Bool, Float
from PIL import Image

from sae_lens_multimodal.adapters.model import check_device
from sae_lens_multimodal.errors import ModelLoadError

if TYPE_CHECKING:
    from sae_lens_multimodal.features.example import Example

PromptOf: TypeAlias = Callable[[str], str]
"""From an explanation to the words that a segmenter is given; "" where it names nothing that can be pointed at."""

MOST_WORDS = 8

_LEAD_IN = re.compile(
    r"^(?:(?:the|this) )?(?:(?:feature|unit|neuron|latent) )?(?:it )?"
    r"(?:(?:fires|activates|responds|lights up|is active) (?:on|for|to|with|in|at) )?"
    r"(?:(?:the )?(?:presence|depictions?|examples?|occurrences?) of )?"
    r"(?:(?:the )?(?:pictures|images|photos|regions|parts|patches|areas) (?:of|with|showing|containing|that show) )?"
    r"(?:(?:a|an|the|any|some|various) )?",
    re.IGNORECASE,
)
_ENDS = re.compile(
    r"[,;:.()\u2013\u2014]| (?:such as|including|like|e\.g|which|that|where|when|as well as|against|especially)\b",
    re.IGNORECASE,
)


def noun_phrase(explanation: str) -> str:
    """Take the first thing that an explanation names: segmenters understand "yellow school bus", not sentences.

    What stands before it ("the feature fires on", "pictures of", articles) and from the first comma or clause on is
    left out, and so is what comes after eight words.

    Example:
        >>> noun_phrase("The feature fires on images of the wheels of cars, especially of sports cars.")
        'wheels of cars'
        >>> noun_phrase("Striped shirts"), noun_phrase("..."), noun_phrase("red")
        ('striped shirts', '', 'red')
    """
    text = " ".join(explanation.split()).strip("\"'\u201c\u201d ")
    text = text[len(found.group()) :] if (found := _LEAD_IN.match(text)) else text
    end = _ENDS.search(text)
    words = (text if end is None else text[: end.start()]).split()
    phrase = " ".join(words[:MOST_WORDS]).lower()
    return phrase if any(character.isalnum() for character in phrase) else ""


class Segmenter(ABC):
    """A `MaskOf`: finds the pixels of what an explanation names. Where there is no such thing, the mask is empty."""

    def __init__(self, *, name: str, prompt_of: PromptOf) -> None:
        self.name, self.prompt_of = name, prompt_of

    @property
    @abstractmethod
    def source(self) -> str:
        """Models and thresholds, recorded with the results."""

    @final
    def __call__(self, text: str, example: Example, image: int) -> Bool[np.ndarray, "h w"] | None:
        """Segment one picture of an example; None for an explanation that names nothing."""
        prompt = self.prompt_of(text)
        return self.segment(example.images[image], prompt) if prompt else None

    @abstractmethod
    def segment(self, picture: Image.Image, prompt: str) -> Bool[np.ndarray, "h w"]:
        """Give the pixels of everything in a picture that a short phrase names, all instances together."""


class Sam3Segmenter(Segmenter):
    """SAM 3 (arXiv 2511.16719), which segments what a short noun phrase names.

    Args:
        model: a `Sam3Model`.
        processor: its `Sam3Processor`.
        name: recorded with the results.
        threshold: from which score on an instance counts.
        mask_threshold: from which probability on a pixel belongs to it.
        prompt_of: from an explanation to the phrase.
    """

    def __init__(
        self,
        model: Any,  # noqa: ANN401 - transformers' own, whose types are loose
        processor: Any,  # noqa: ANN401
        *,
        name: str,
        threshold: float = 0.5,
        mask_threshold: float = 0.5,
        prompt_of: PromptOf = noun_phrase,
    ) -> None:
        super().__init__(name=name, prompt_of=prompt_of)
        self.model, self.processor = model.eval(), processor
        self.threshold, self.mask_threshold = threshold, mask_threshold

    @classmethod
    def load(cls, name: str | Path, *, device: str = "cpu", dtype: str = "auto", **settings: Any) -> Sam3Segmenter:  # noqa: ANN401 - of the class
        """Load a checkpoint by hub name or folder, such as `facebook/sam3`.

        Raises:
            ModelLoadError: it does not load, is another model, or torchvision, which its processor needs, is missing.
        """
        from transformers import Sam3Model, Sam3Processor

        _check_kind(name, {"sam3", "sam3_video"}, "SAM 3")
        processor = _load(Sam3Processor, name)
        return cls(_load_model(Sam3Model, name, device, dtype), processor, name=str(name), **settings)

    @property
    def source(self) -> str:
        """Model and thresholds."""
        return f"SAM 3 {self.name}, threshold {self.threshold:g}, mask threshold {self.mask_threshold:g}"

    @torch.no_grad()
    def segment(self, picture: Image.Image, prompt: str) -> Bool[np.ndarray, "h w"]:
        """Ask for all instances, and put their masks together."""
        inputs = self.processor(images=picture.convert("RGB"), text=self._fitting(prompt), return_tensors="pt")
        output = self.model(**_on(self.model, inputs, "pixel_values", "input_ids", "attention_mask"))
        (found,) = self.processor.post_process_instance_segmentation(
            output,
            threshold=self.threshold,
            mask_threshold=self.mask_threshold,
            target_sizes=[(picture.height, picture.width)],
        )
        return _union(found["masks"], picture)

    def _fitting(self, prompt: str) -> str:
        """Leave out the last words of a phrase that is too long for the text encoder."""
        words, most = prompt.split(), int(self.model.config.text_config.max_position_embeddings)
        while len(words) > 1 and len(self.processor.tokenizer(" ".join(words))["input_ids"]) > most:
            words.pop()
        return " ".join(words)


class GroundedSamSegmenter(Segmenter):
    """Grounding DINO finds boxes for a phrase, SAM or SAM 2 fills them (arXiv 2303.05499 and 2304.02643; 2401.14159).

    Args:
        detector: a Grounding DINO model.
        detector_processor: its processor.
        segmenter: a SAM or SAM 2 model.
        segmenter_processor: its processor.
        name: recorded with the results.
        box_threshold: from which score on a box counts.
        text_threshold: from which score on a word belongs to a box; it does not change the boxes.
        prompt_of: from an explanation to the phrase.
    """

    def __init__(
        self,
        detector: Any,  # noqa: ANN401 - transformers' own, whose types are loose
        detector_processor: Any,  # noqa: ANN401
        segmenter: Any,  # noqa: ANN401
        segmenter_processor: Any,  # noqa: ANN401
        *,
        name: str,
        box_threshold: float = 0.35,
        text_threshold: float = 0.25,
        prompt_of: PromptOf = noun_phrase,
    ) -> None:
        super().__init__(name=name, prompt_of=prompt_of)
        self.detector, self.detector_processor = detector.eval(), detector_processor
        self.segmenter, self.segmenter_processor = segmenter.eval(), segmenter_processor
        self.box_threshold, self.text_threshold = box_threshold, text_threshold

    @classmethod
    def load(
        cls,
        detector: str | Path,
        segmenter: str | Path,
        *,
        device: str = "cpu",
        dtype: str = "auto",
        **settings: Any,  # noqa: ANN401 - of the class
    ) -> GroundedSamSegmenter:
        """Load two checkpoints, such as `IDEA-Research/grounding-dino-base` and `facebook/sam-vit-huge`.

        Raises:
            ModelLoadError: one does not load, is another model, or its processor needs torchvision, which is missing.
        """
        from transformers import AutoModelForMaskGeneration, AutoModelForZeroShotObjectDetection, AutoProcessor

        _check_kind(detector, {"grounding-dino", "mm-grounding-dino"}, "Grounding DINO")
        _check_kind(segmenter, {"sam", "sam2"}, "SAM or SAM 2")
        processors = [_load(AutoProcessor, name) for name in (detector, segmenter)]
        return cls(
            _load_model(AutoModelForZeroShotObjectDetection, detector, device, dtype),
            processors[0],
            _load_model(AutoModelForMaskGeneration, segmenter, device, dtype),
            processors[1],
            name=f"{detector} and {segmenter}",
            **settings,
        )

    @property
    def source(self) -> str:
        """Models and thresholds."""
        return f"Grounding DINO and SAM {self.name}, box threshold {self.box_threshold:g}"

    @torch.no_grad()
    def segment(self, picture: Image.Image, prompt: str) -> Bool[np.ndarray, "h w"]:
        """Find boxes, fill them, and put their masks together."""
        picture = picture.convert("RGB")
        boxes = self.boxes(picture, prompt)
        if not len(boxes):
            return np.zeros((picture.height, picture.width), dtype=bool)
        inputs = self.segmenter_processor(images=picture, input_boxes=[boxes.tolist()], return_tensors="pt")
        output = self.segmenter(**_on(self.segmenter, inputs, "pixel_values", "input_boxes"), multimask_output=False)
        sizes = [inputs["original_sizes"]]
        if "reshaped_input_sizes" in inputs:  # SAM keeps the shape of pictures and pads them, SAM 2 squeezes them
            sizes.append(inputs["reshaped_input_sizes"])
        (masks,) = self.segmenter_processor.post_process_masks(output.pred_masks.float().cpu(), *sizes)
        return _union(masks.flatten(0, 1), picture)

    @torch.no_grad()
    def boxes(self, picture: Image.Image, prompt: str) -> Float[np.ndarray, "n 4"]:
        """Find the boxes of what a phrase names: x0, y0, x1, y1 in pixels of the picture."""
        inputs = self.detector_processor(images=picture, text=[[prompt]], return_tensors="pt")
        names = ("pixel_values", "pixel_mask", "input_ids", "attention_mask", "token_type_ids")
        output = self.detector(**_on(self.detector, inputs, *names))
        (found,) = self.detector_processor.post_process_grounded_object_detection(
            output,
            inputs["input_ids"],
            threshold=self.box_threshold,
            text_threshold=self.text_threshold,
            target_sizes=[(picture.height, picture.width)],
        )
        boxes: Float[np.ndarray, "n 4"] = found["boxes"].float().cpu().numpy()
        return boxes.clip(0, [picture.width, picture.height] * 2)


def _on(model: Any, inputs: Any, *names: str) -> dict[str, torch.Tensor]:  # noqa: ANN401 - transformers' own
    """Put the inputs that a model takes where it is, numbers in its own type."""
    found = {name: inputs[name].to(model.device) for name in names if name in inputs}
    return {name: value.to(model.dtype) if value.is_floating_point() else value for name, value in found.items()}


def _union(masks: torch.Tensor, picture: Image.Image) -> Bool[np.ndarray, "h w"]:
    if not len(masks):
        return np.zeros((picture.height, picture.width), dtype=bool)
    return masks.bool().any(dim=0).cpu().numpy()


def _check_kind(name: str | Path, kinds: set[str], what: str) -> None:
    from transformers import AutoConfig

    found = _load(AutoConfig, name).model_type
    if found not in kinds:
        raise ModelLoadError(f"{name} is a model of type {found!r}; expected {what}.")


def _load_model(auto_class: Any, name: str | Path, device: str, dtype: str) -> Any:  # noqa: ANN401 - transformers' own
    check_device(device)
    return _load(auto_class, name, dtype=dtype).to(device)


def _load(auto_class: Any, name: str | Path, **options: Any) -> Any:  # noqa: ANN401 - transformers' own
    try:
        return auto_class.from_pretrained(str(name), **options)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, ImportError) as error:
        line = " ".join(str(error).split())[:300] or type(error).__name__
        advice = "expected a checkpoint of transformers that can be reached, or a folder with one"
        if "torchvision" in line.casefold():
            advice = "its processor needs torchvision: pip install torchvision"
        raise ModelLoadError(f"{name} does not load ({line}); {advice}.") from error
