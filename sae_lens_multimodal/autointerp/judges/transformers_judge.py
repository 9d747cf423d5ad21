"""A judge in this process: a vision-language model that answers in batches."""

from __future__ import annotations

import hashlib
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae_lens_multimodal.adapters.batch import EncodedBatch
from sae_lens_multimodal.adapters.model import VisionLanguageModel, load_model
from sae_lens_multimodal.autointerp.judges.base import (
    FailureKind,
    Judge,
    JudgeFailure,
    JudgeReply,
    JudgeRequest,
    Outcome,
)
from sae_lens_multimodal.autointerp.judges.log_probabilities import ReplyToken
from sae_lens_multimodal.errors import ConfigError, ImageError, JudgeError, PromptError
from sae_lens_multimodal.hooks.metrics import append_tokens, shortened

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

    @property
    def gives_log_probabilities(self) -> bool:
        """It does."""
        return True

    @property
    def rates_given_replies(self) -> bool:
        """It does, in one forward pass."""
        return True

    def _replies(self, requests: Sequence[JudgeRequest]) -> Iterator[tuple[int, Outcome]]:
        keys = [_likeness(request) for request in requests]
        order = sorted(range(len(requests)), key=lambda index: keys[index])
        for _, group in groupby(order, key=lambda index: keys[index].together):
            members = list(group)
            for start in range(0, len(members), self.batch_size):
                indices = members[start : start + self.batch_size]
                yield from zip(indices, self._answer([requests[index] for index in indices]), strict=True)

    def _answer(self, requests: Sequence[JudgeRequest]) -> list[Outcome]:
        """Answer one batch; where it cannot be encoded, its requests one by one."""
        started = time.monotonic()
        try:
            replies = self._generate(requests) if requests[0].given_reply is None else self._rate(requests)
        except torch.OutOfMemoryError as error:
            raise JudgeError(
                f"{self.id} ran out of memory on a batch of {len(requests)} requests; give a batch_size smaller than "
                f"{self.batch_size} and run again: what was answered so far is kept."
            ) from error
        except (PromptError, ImageError, _NoTokensError) as error:
            if len(requests) > 1:
                return [outcome for request in requests for outcome in self._answer([request])]
            return [JudgeFailure.of(requests[0], FailureKind.REJECTED, str(error))]
        seconds = (time.monotonic() - started) / len(requests)
        return [replace(reply, seconds=seconds) for reply in replies]

    def _encode(self, requests: Sequence[JudgeRequest]) -> EncodedBatch:
        return self.model.encode([_conversation(request) for request in requests], add_generation_prompt=True)

    @torch.no_grad()
    def _generate(self, requests: Sequence[JudgeRequest]) -> list[JudgeReply]:
        """Answer one batch as `VisionLanguageModel.answer` does."""
        batch, n_top = self._encode(requests), requests[0].top_log_probabilities
        with warnings.catch_warnings():
            # an edit that holds for all steps ends with the generation, by design
            warnings.filterwarnings("ignore", message=".*was never reached: the loop asked", category=UserWarning)
            found = self.model.generate(
                **batch,
                max_new_tokens=requests[0].max_new_tokens,
                do_sample=False,
                **({"return_dict_in_generate": True, "output_logits": True} if n_top else {}),
            )
        tokens = found.sequences if n_top else found
        new = tokens[:, batch["input_ids"].shape[1] :]
        texts = [text.strip() for text in self.model.tokenizer.batch_decode(new, skip_special_tokens=True)]
        likely: list[tuple[ReplyToken, ...] | None] = [None] * len(texts)
        if n_top:
            likely = list(self._reply_tokens(new, found.logits, n_top))
        counted = batch["attention_mask"].sum(dim=1).tolist()
        return [
            JudgeReply(text=text, tokens_in=n_in, tokens_out=self._count(text), log_probabilities=one)
            for text, n_in, one in zip(texts, counted, likely, strict=True)
        ]

    @torch.no_grad()
    def _rate(self, requests: Sequence[JudgeRequest]) -> list[JudgeReply]:
        """Work out how likely the given words are, the same for all requests of the batch."""
        text = requests[0].given_reply or ""
        ids = self.model.tokenizer(text, add_special_tokens=False)["input_ids"]
        unknown = self.model.tokenizer.unk_token_id
        if not ids or (unknown is not None and unknown in ids):
            raise _NoTokensError(
                f"{self.id} has no tokens for the words {text[:80]!r}; it cannot say how likely they are."
            )
        batch = self._encode(requests)
        longer = append_tokens(self.model, batch, ids[:-1]) if len(ids) > 1 else batch
        with self.model.trace(**shortened(self.model, longer, len(ids))):
            logits = self.model.output.logits.save()
        new = torch.tensor(ids).expand(len(requests), -1)
        likely = self._reply_tokens(new, logits[:, -len(ids) :].unbind(1), requests[0].top_log_probabilities)
        counted = batch["attention_mask"].sum(dim=1).tolist()
        return [
            JudgeReply(text=text, tokens_in=n_in + len(ids) - 1, log_probabilities=one)
            for n_in, one in zip(counted, likely, strict=True)
        ]

    def _reply_tokens(
        self, new: Int[Tensor, "rows n"], logits: Sequence[Float[Tensor, "rows vocabulary"]], n_top: int
    ) -> Iterator[tuple[ReplyToken, ...]]:
        """Give the tokens of each row that are text, with the log-probabilities of the full vocabulary."""
        own: list[list[float]] = []
        best: list[list[list[float]]] = []
        which: list[list[list[int]]] = []
        # one place at a time: all of them in float32 would take more memory than the rest
        for place, one in enumerate(logits):
            every = one.float().log_softmax(dim=-1)
            own.append(every.gather(-1, new[:, place].to(every.device)[:, None])[:, 0].tolist())
            values, tokens = every.topk(min(n_top, every.shape[-1]), dim=-1)
            best.append(values.tolist())
            which.append(tokens.tolist())
        control = set(self.model.tokenizer.all_special_ids)
        for row, ids in enumerate(new.tolist()):
            kept = [place for place, token in enumerate(ids) if token not in control]
            spelt = self._spelt([ids[place] for place in kept])
            yield tuple(
                ReplyToken(
                    token=text,
                    log_probability=own[place][row],
                    top=tuple(zip(map(self._one, which[place][row]), best[place][row], strict=True)),
                )
                for place, text in zip(kept, spelt, strict=True)
            )

    def _spelt(self, ids: Sequence[int]) -> list[str]:
        """Spell each token as what it adds to the text."""
        texts = ["", *(self.model.tokenizer.decode(ids[: n + 1]) for n in range(len(ids)))]
        return [longer[len(text) :] for text, longer in pairwise(texts)]

    def _one(self, token: int) -> str:
        return str(self.model.tokenizer.decode([token]))

    def _count(self, text: str) -> int:
        return len(self.model.tokenizer.encode(text, add_special_tokens=False))


class _NoTokensError(ValueError):
    """Words that the model's tokenizer does not know."""


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


class _Likeness(NamedTuple):
    """Sort key that puts requests of like length and cost into one batch."""

    together: tuple[int, int, int, str]
    """Equal within a batch: the longest reply, how many pictures, how many log-probabilities, and of which words."""
    size: int


def _likeness(request: JudgeRequest) -> _Likeness:
    pixels = sum(picture.width * picture.height for picture in request.pictures)
    given = "" if request.given_reply is None else f"given {request.given_reply}"
    together = (request.max_new_tokens, len(request.pictures), request.top_log_probabilities, given)
    return _Likeness(together, pixels + len(request.text))
