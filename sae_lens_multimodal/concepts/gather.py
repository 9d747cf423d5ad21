"""Gathering the states that predict a word, stand at it or near it, over the rows whose caption holds it."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from sae_lens_multimodal.adapters.model import VisionLanguageModel
from sae_lens_multimodal.concepts.spans import Role, Span, caption_pieces, word_spans
from sae_lens_multimodal.concepts.states import ConceptStates, StateShard, StateWriter
from sae_lens_multimodal.concepts.text import find_words
from sae_lens_multimodal.data.batches import PromptBatch, encoded_batches
from sae_lens_multimodal.data.raw import RawRow, known_length
from sae_lens_multimodal.data.rows import Prompt
from sae_lens_multimodal.data.sources import Rows
from sae_lens_multimodal.data.stream import SkippedRow, build_prompt, numbered_rows, open_dataset
from sae_lens_multimodal.errors import ConfigError, DatasetError, PromptError, SelectionError
from sae_lens_multimodal.features.hashing import image_id
from sae_lens_multimodal.hooks.read import read_activations

logger = logging.getLogger(__name__)

Place: TypeAlias = "Literal['before', 'predicting', 'first', 'last', 'at', 'mean'] | tuple[int, int]"
"""Which states of a word: see `gather_states`."""
_STRETCH_ROWS = 1000
"""Rows without the word after which a batch is closed, however few prompts it has."""
_NAMED_PLACES = ("before", "predicting", "first", "last", "at", "mean")


@dataclass(frozen=True)
class _Wanted:
    """What is looked for."""

    word: str
    at: Place
    role: Role
    question: str | None
    every: bool
    noise_seed: int | None
    only: frozenset[int] | None
    max_rows: int | None


def gather_states(
    model: VisionLanguageModel,
    dataset: str | Path | Rows,
    word: str,
    *,
    hook_name: str | None = None,
    at: Place = "before",
    output: str | Path | None = None,
    role: Role = "auto",
    question: str | None = None,
    every: bool = False,
    pictures: Literal["own", "noise"] = "own",
    batch_size: int = 8,
    context_size: int | None = None,
    max_rows: int | None = None,
    max_states: int | None = None,
    only_rows: Collection[int] | None = None,
    split: str = "train",
    image_folder: str | Path | None = None,
    seed: int = 0,
    shard_states: int = 4096,
    resume: bool = True,
    progress: bool = True,
) -> ConceptStates:
    """Read a hook's states for a word or phrase, over the rows whose caption holds it as a whole word.

    Captions are searched by characters, with Unicode's own idea of letters, and the tokens found by the tokenizer's
    offsets: "train" is not in "training". Pictures are opened only of rows that hold the word, and the forward pass
    ends at the hook. A run is saved every half minute or so; a killed one goes on there and leaves the same files as an
    unbroken one.

    Args:
        model: The model.
        dataset: Prompts: a hub name, path, datasets object or list of rows (see `open_dataset`).
        word: A word or phrase.
        hook_name: Where; by default the output of the last block.
        at: `"before"`: the state that predicts the word's first token; `"predicting"`: the states that predict each of
            its tokens; `"first"`, `"last"`, `"at"`: at its first, last or all tokens; `"mean"`: the mean over its
            tokens; or a pair (a, b): the tokens from `a` up to, but without, `b`, counted from the word's first token.
        output: Folder to write to, new or of this same run; None to keep the states in memory.
        role: Whose words are the caption: `"auto"` the assistant's where it speaks, all otherwise.
        question: For rows of a picture and a caption: ask this, and let the caption be the assistant's answer.
        every: Take every occurrence in a caption, not the first alone.
        pictures: `"noise"` puts seeded noise of the same size in the place of every picture: a floor.
        batch_size: Prompts a forward pass.
        context_size: Prompts of more tokens are skipped; None for any length.
        max_rows: Rows to read at most.
        max_states: States to gather at most, up to those of the last batch.
        only_rows: Numbers of the rows to look at; None for all.
        split: Split of a dataset given by name.
        image_folder: Where relative picture paths begin.
        seed: Of the noise.
        shard_states: States to a file.
        resume: Whether to go on with an unfinished run in `output`, or return a finished one.
        progress: Show a progress bar on stderr.

    Raises:
        UnknownHookError, ConfigError: there is no such hook, or a setting cannot work.
        SelectionError: the hook sees pictures, not tokens.
        DatasetError: the dataset cannot be read, or no caption holds the word.
        StoreError: `output` holds something else.
    """
    hook = model.hooks.resolve(hook_name or f"blocks.{model.n_layers - 1}.hook_resid_post")
    if hook.tower != "language":
        raise SelectionError(f"{hook.name} sees pictures, not words; expected a hook of the language model.")
    _check(word, at, role, pictures, {"batch_size": batch_size, "shard_states": shard_states})
    rows = open_dataset(dataset, split=split)
    settings: dict[str, Any] = {
        "word": word,
        "at": list(at) if isinstance(at, tuple) else at,
        "hook_name": hook.name,
        "model_name": model.name,
        "dataset": str(dataset) if isinstance(dataset, str | Path) else None,
        "split": split,
        "n_rows": known_length(rows),
        "first_row": _fingerprint(rows),
        "image_folder": None if image_folder is None else str(image_folder),
        "dtype": str(model.dtype).removeprefix("torch."),
        # Only what changes the states is there: a seed draws noise, and batches of another size give the same.
        **{"role": role, "question": question, "every": every, "pictures": pictures},
        "seed": seed if pictures == "noise" else None,
        **{"context_size": context_size, "max_rows": max_rows, "max_states": max_states},
        "only_rows": None if only_rows is None else _digest(json.dumps(sorted(only_rows))),
    }
    folder = None if output is None else Path(output)
    writer = StateWriter(folder, settings, shard_states, resume=resume)
    if writer.finished is not None:
        return writer.finished
    only = None if only_rows is None else frozenset(only_rows)
    wanted = _Wanted(word, at, role, question, every, seed if pictures == "noise" else None, only, max_rows)
    _Gathering(model, str(hook.name), wanted, writer, Path(image_folder) if image_folder else None).over(
        rows, batch_size, context_size, max_states, show=progress
    )
    found = writer.finish()
    if found.report.skipped:
        logger.warning("%s", found.summary())
    return found


def _check(word: str, at: Place, role: str, pictures: str, sizes: Mapping[str, int]) -> None:
    if not word.strip():
        raise ConfigError("Got an empty word; expected a word or phrase.")
    named = isinstance(at, str) and at in _NAMED_PLACES
    if not named and not (isinstance(at, tuple) and len(at) == 2 and at[0] < at[1]):
        raise ConfigError(f"Got at={at!r}; expected one of {', '.join(_NAMED_PLACES)} or a pair such as (-1, 1).")
    if role not in get_args(Role):
        raise ConfigError(f"Got role={role!r}; expected one of {', '.join(get_args(Role))}.")
    if pictures not in ("own", "noise"):
        raise ConfigError(f"Got pictures={pictures!r}; expected 'own' or 'noise'.")
    for name, size in sizes.items():
        if size < 1:
            raise ConfigError(f"Got {name}={size}; expected 1 or more.")


def _fingerprint(rows: Rows) -> str | None:
    """A digest of the first row's text, which tells one dataset from another."""
    for _, raw in numbered_rows(rows, 0):
        return _digest(json.dumps(sorted(_strings(raw.content)), ensure_ascii=False))
    return None


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def _strings(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for one in value.values():
            yield from _strings(one)
    elif isinstance(value, list | tuple):
        for one in value:
            yield from _strings(one)


class _Gathering:
    """One run under way."""

    def __init__(
        self, model: VisionLanguageModel, hook: str, wanted: _Wanted, writer: StateWriter, image_folder: Path | None
    ) -> None:
        self._model, self._hook, self._wanted, self._writer = model, hook, wanted, writer
        self._image_folder = image_folder

    def over(
        self, rows: Rows, batch_size: int, context_size: int | None, max_states: int | None, *, show: bool
    ) -> None:
        """Go through what is left of the dataset."""
        writer = self._writer
        total = known_length(rows) if self._wanted.max_rows is None else self._wanted.max_rows
        with tqdm(total=total, initial=writer.n_read, unit="row", desc="gather", disable=not show) as bar:
            groups = self._groups(rows, batch_size)
            while max_states is None or writer.n_states < max_states:
                if (group := next(groups, None)) is None:
                    break
                self._read(group, batch_size, context_size)
                bar.update(writer.n_read - bar.n)

    def _groups(self, rows: Rows, batch_size: int) -> Iterator[list[Prompt]]:
        """Prompts that hold the word, a batch at a time, or what a long stretch of rows holds of them.

        Where a group ends depends on the rows alone, so that a resumed run makes the same groups; a rare word must not
        leave a run without a place to go on from.
        """
        group: list[Prompt] = []
        begin = self._writer.n_read
        for prompt in self._prompts(rows):
            group += [] if prompt is None else [prompt]
            if len(group) == batch_size or self._writer.n_read - begin >= _STRETCH_ROWS:
                yield group
                group, begin = [], self._writer.n_read
        if self._writer.n_read > begin:
            yield group

    def _read(self, group: Sequence[Prompt], batch_size: int, context_size: int | None) -> None:
        writer = self._writer
        found: StateShard | None = None
        if group:
            try:
                for batch in encoded_batches(
                    self._model, group, batch_size=batch_size, context_size=context_size, report=writer.report
                ):
                    found = self._states(batch)
            except DatasetError as error:
                # None of this group could be encoded; each is counted, and the next may be better.
                logger.debug("%s", error)
        writer.add(found)

    def _prompts(self, rows: Rows) -> Iterator[Prompt | None]:
        """For each row that is looked at its prompt, or None where its caption does not hold the word."""
        writer, only = self._writer, self._wanted.only
        last = max(only, default=-1) if only is not None else None
        for place, raw in numbered_rows(rows, writer.next_row):
            done = self._wanted.max_rows is not None and writer.n_read >= self._wanted.max_rows
            if done or (last is not None and place > last):
                return
            writer.n_read, writer.next_row = writer.n_read + 1, place + 1
            if only is None or place in only:
                writer.report.read += 1
                yield self._prompt(place, raw)

    def _prompt(self, place: int, raw: RawRow) -> Prompt | None:
        wanted = self._wanted
        if any(find_words(text, wanted.word) for text in _strings(raw.content)):
            prompt = build_prompt(place, raw, self._image_folder)
            if isinstance(prompt, SkippedRow):
                prompt.count_in(self._writer.report)
                return None
            prompt = self._prepared(prompt)
            if any(find_words(piece.text, wanted.word) for piece in caption_pieces(prompt.messages, wanted.role)):
                return prompt
        self._writer.n_without += 1
        return None

    def _prepared(self, prompt: Prompt) -> Prompt:
        wanted = self._wanted
        if wanted.question is not None:
            prompt = _as_answer(prompt, wanted.question)
        return prompt if wanted.noise_seed is None else _with_noise(prompt, wanted.noise_seed)

    def _states(self, batch: PromptBatch) -> StateShard:
        """Read the states of one batch."""
        inputs = batch.batch.to(self._model.device)
        values = read_activations(self._model, inputs, self._hook)[self._hook].flatten(2)
        found = []
        mask = batch.batch["attention_mask"].bool()
        for index, prompt in enumerate(batch.prompts):
            tokens = batch.batch["input_ids"][index][mask[index]].tolist()
            try:
                spans = word_spans(
                    self._model.family, prompt.messages, self._wanted.word, tokens, role=self._wanted.role
                )
                kept = values[index][mask[index].to(values.device)]
                own = self._of_prompt(prompt, kept, spans)
            except PromptError as error:
                self._writer.report.skip("word cannot be placed", prompt.row, str(error))
                continue
            if all(bool(one.states.isfinite().all()) for one in own):
                found += own
            else:
                self._writer.report.skip("states are not finite", prompt.row, "they hold NaN or infinity")
        if not found:
            nothing = torch.zeros(0, dtype=torch.int64)
            return StateShard(values[0, :0].cpu(), nothing, nothing, _pairs([]), captions=[], shows=[])
        return StateShard.joined(found)

    def _of_prompt(self, prompt: Prompt, values: Float[Tensor, "seq d"], spans: Sequence[Span]) -> list[StateShard]:
        pieces = caption_pieces(prompt.messages, self._wanted.role)
        caption = "\n".join(piece.text for piece in pieces)
        names = sorted({image_id(image) for image in prompt.images}) or [f"text {_digest(caption)}"]
        shards = []
        for span in spans if self._wanted.every else spans[:1]:
            positions = _positions(span, self._wanted.at)
            if not positions or positions[0] < 0 or positions[-1] >= len(values):
                raise PromptError(f"the tokens at {self._wanted.at!r} of the word lie outside of the prompt")
            states = values[positions]
            if self._wanted.at == "mean":
                states, positions = states.float().mean(0, keepdim=True).to(states.dtype), positions[:1]
            n = len(positions)
            place = (torch.full((n,), prompt.row), torch.tensor(positions), _pairs([span] * n))
            shards.append(StateShard(states.cpu(), *place, captions=[caption] * n, shows=[names] * n))
        return shards


def _pairs(spans: Sequence[Span]) -> Tensor:
    return torch.tensor([list(span) for span in spans], dtype=torch.int64).reshape(-1, 2)


def _positions(span: Span, at: Place) -> list[int]:
    """The tokens whose states are taken.

    >>> _positions(Span(5, 7), "before"), _positions(Span(5, 7), "predicting"), _positions(Span(5, 7), (-1, 1))
    ([4], [4, 5], [4, 5])
    """
    if isinstance(at, tuple):
        return list(range(span.start + at[0], span.start + at[1]))
    match at:
        case "before":
            return [span.start - 1]
        case "predicting":
            return list(range(span.start - 1, span.stop - 1))
        case "first":
            return [span.start]
        case "last":
            return [span.stop - 1]
        case _:
            return list(range(span.start, span.stop))


def _as_answer(prompt: Prompt, question: str) -> Prompt:
    """A caption as the answer to a question; a prompt in which the assistant speaks already stays as it is."""
    if any(message["role"] == "assistant" for message in prompt.messages):
        return prompt
    parts = [part for message in prompt.messages for part in message["content"]]
    pictures = [part for part in parts if part["type"] == "image"]
    texts = [part for part in parts if part["type"] == "text"]
    asked = {"role": "user", "content": [*pictures, {"type": "text", "text": question}]}
    return replace(prompt, messages=[asked, {"role": "assistant", "content": texts}])


def _with_noise(prompt: Prompt, seed: int) -> Prompt:
    rng = np.random.default_rng((seed, prompt.row))
    noise = [
        Image.fromarray(rng.integers(0, 256, (image.height, image.width, 3), dtype=np.uint8)) for image in prompt.images
    ]
    left = iter(noise)
    messages = [
        {
            **message,
            "content": [
                {**part, "image": next(left)} if part["type"] == "image" else part for part in message["content"]
            ],
        }
        for message in prompt.messages
    ]
    return replace(prompt, messages=messages, images=noise)
