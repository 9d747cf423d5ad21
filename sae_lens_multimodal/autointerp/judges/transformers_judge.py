"""A judge in this process: a vision-language model that answers in batches."""

from __future__ import annotations

import hashlib
import time
import warnings
from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from sae_lens_multimodal.adapters.model import VisionLanguageModel, load_model
from sae_lens_multimodal.autointerp.judges.base import (
    FailureKind,
    Judge,
    JudgeFailure,
    JudgeReply,
    JudgeRequest,
    Outcome,
)
from sae_lens_multimodal.errors import ConfigError, ImageError, JudgeError, PromptError

_SAMPLED_VALUES = 16
"""How many values of every parameter the fingerprint looks at."""


class TransformersJudge(Judge):
    """Asks a transformers model in this process, greedily, many requests in one batch.

    Args:
        model: a model of this package, or a name or folder to load.
        batch_size: requests in one batch.
        **load_options: for `load_model`, where a name or folder is given.

    Raises:
        ConfigError: a batch size below 1.
        ModelLoadError: the name or folder does not load.
    """

    def __init__(
        self,
        model: VisionLanguageModel | str | Path,
        *,
        batch_size: int = 32,
        **load_options: Any,  # noqa: ANN401 - passed on
    ) -> None:
        super().__init__()
        if batch_size < 1:
            raise ConfigError(f"batch_size is {batch_size}; expected at least 1.")
        self.batch_size = batch_size
        self.model = load_model(str(model), **load_options) if isinstance(model, str | Path) else model

    @property
    def id(self) -> str:
        """The model's name; of a folder, the last two parts of its path."""
        name = str(self.model.name)
        return "/".join(Path(name).resolve().parts[-2:]) if Path(name).is_dir() else name

    @cached_property
    def cache_name(self) -> str:
        """The id and a fingerprint of the weights: a folder may hold other weights tomorrow."""
        return f"{self.id} {fingerprint(self.model._module)}"

    def _replies(self, requests: Sequence[JudgeRequest]) -> Iterator[tuple[int, Outcome]]:
        order = sorted(range(len(requests)), key=lambda index: _likeness(requests[index]))
        for _, group in groupby(order, key=lambda index: _likeness(requests[index])[:2]):
            members = list(group)
            for start in range(0, len(members), self.batch_size):
                indices = members[start : start + self.batch_size]
                yield from zip(indices, self._answer([requests[index] for index in indices]), strict=True)

    def _answer(self, requests: Sequence[JudgeRequest]) -> list[Outcome]:
        """Answer one batch; where it cannot be encoded, its requests one by one."""
        started = time.monotonic()
        try:
            texts, tokens_in = self._generate(requests)
        except torch.OutOfMemoryError as error:
            raise JudgeError(
                f"{self.id} ran out of memory on a batch of {len(requests)} requests; give a batch_size smaller than "
                f"{self.batch_size} and run again: what was answered so far is kept."
            ) from error
        except (PromptError, ImageError) as error:
            if len(requests) > 1:
                return [outcome for request in requests for outcome in self._answer([request])]
            return [JudgeFailure.of(requests[0], FailureKind.REJECTED, str(error))]
        seconds = (time.monotonic() - started) / len(requests)
        return [
            JudgeReply(text=text, tokens_in=n_in, tokens_out=self._count(text), seconds=seconds)
            for text, n_in in zip(texts, tokens_in, strict=True)
        ]

    @torch.no_grad()
    def _generate(self, requests: Sequence[JudgeRequest]) -> tuple[list[str], list[int]]:
        """Answer one batch as `VisionLanguageModel.answer` does, and count the tokens of each prompt."""
        batch = self.model.encode([_conversation(request) for request in requests], add_generation_prompt=True)
        with warnings.catch_warnings():
            # an edit that holds for all steps ends with the generation, by design
            warnings.filterwarnings("ignore", message=".*was never reached: the loop asked", category=UserWarning)
            tokens = self.model.generate(**batch, max_new_tokens=requests[0].max_new_tokens, do_sample=False)
        new = tokens[:, batch["input_ids"].shape[1] :]
        texts = [text.strip() for text in self.model.tokenizer.batch_decode(new, skip_special_tokens=True)]
        return texts, batch["attention_mask"].sum(dim=1).tolist()

    def _count(self, text: str) -> int:
        return len(self.model.tokenizer.encode(text, add_special_tokens=False))


def fingerprint(model: torch.nn.Module) -> str:
    """Hash a few values of every parameter: different for other, further trained or edited weights.

    Args:
        model: any module; parameters without storage (meta device) count by shape only.

    Returns:
        12 hexadecimal digits.
    """
    content = hashlib.sha256()
    for name, parameter in model.named_parameters():
        content.update(f"{name}{tuple(parameter.shape)}{parameter.dtype}".encode())
        if parameter.device.type != "meta":
            flat = parameter.detach().reshape(-1)
            sample = flat[:: max(1, flat.numel() // _SAMPLED_VALUES)][:_SAMPLED_VALUES]
            content.update(sample.float().cpu().numpy().tobytes())
    return content.hexdigest()[:12]


def _conversation(request: JudgeRequest) -> list[dict[str, Any]]:
    parts = [
        {"type": "text", "text": part} if isinstance(part, str) else {"type": "image", "image": part}
        for part in request.parts
    ]
    return [{"role": "user", "content": parts}]


def _likeness(request: JudgeRequest) -> tuple[int, int, int]:
    """Sort key that puts requests of like length and cost into one batch; the first two must be equal there."""
    pixels = sum(picture.width * picture.height for picture in request.pictures)
    return request.max_new_tokens, len(request.pictures), pixels + len(request.text)
