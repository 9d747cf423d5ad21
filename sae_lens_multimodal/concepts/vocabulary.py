"""Which of a tokenizer's tokens are whole words, and the words that directions of the residual stream speak of."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from sae_lens_multimodal.adapters.encode import special_ids
from sae_lens_multimodal.adapters.model import VisionLanguageModel
from sae_lens_multimodal.concepts.text import is_unspaced, is_word
from sae_lens_multimodal.errors import ConfigError, SAEMismatchError
from sae_lens_multimodal.hooks.effects import output_logits

_MARKS = ("▁", "Ġ")
"""How the conventions of SentencePiece and of byte-level BPE write that a token begins a word."""
_CONTINUES = ("##", "@@")
_MARKED_SHARE = 0.05


class Convention(NamedTuple):
    """How a tokenizer tells words from pieces of words."""

    mark: str | None
    """What a token that begins a word begins with; None where tokens are words, or where pieces are what is marked."""
    has_pieces: bool
    """Whether there are pieces of words at all."""


@lru_cache(maxsize=8)
def convention_of(tokenizer: Any) -> Convention:  # noqa: ANN401 - any transformers tokenizer
    """Tell the convention by the vocabulary: a mark counts where one token in twenty has it."""
    tokens = list(tokenizer.get_vocab())
    for mark in _MARKS:
        if sum(token.startswith(mark) for token in tokens) > _MARKED_SHARE * len(tokens):
            return Convention(mark, True)
    marked = sum(token.startswith("##") or token.endswith("@@") for token in tokens)
    return Convention(None, marked > 0)


def as_word(tokenizer: Any, token_id: int, min_letters: int | None = None) -> str | None:  # noqa: ANN401
    """A token as a word; None where it is none.

    Tokens that go on with a word are none by the tokenizer's own convention (`▁`, `Ġ` or `##`), but for scripts that
    put no blanks between words; nor are numbers, signs, control tokens, and bytes of letters.

    Args:
        tokenizer: any transformers tokenizer.
        token_id: the token.
        min_letters: fewest letters of a word; None for 2, or 1 where the tokenizer knows whole words only.
    """
    mark, has_pieces = convention_of(tokenizer)
    token = tokenizer.convert_ids_to_tokens(int(token_id))
    if token is None or token.startswith(_CONTINUES[0]) or token.endswith(_CONTINUES[1]):
        return None
    text = token.replace("▁", " ") if mark == "▁" else str(tokenizer.convert_tokens_to_string([token]))
    text = text.strip()
    if mark is not None and not token.startswith(mark) and not (text and is_unspaced(text[0])):
        return None
    fewest = min_letters if min_letters is not None else (2 if has_pieces else 1)
    return text if is_word(text, fewest) else None


@torch.no_grad()
def word_lists(
    model: VisionLanguageModel,
    directions: Float[Tensor, "k d_model"],
    n: int = 10,
    *,
    min_letters: int | None = None,
    contrast: bool = False,
) -> list[list[tuple[str, float]]]:
    """The words that each direction makes likelier, strongest first, upper and lower case as one.

    A direction goes through the final norm's weights and the unembedding, as in `hooks.effects`.

    Args:
        model: the model.
        directions: in the residual stream.
        n: words to a direction.
        min_letters: fewest letters of a word; None for 2, or 1 where the tokenizer knows whole words only.
        contrast: take off what the directions, scaled to length 1, have in common: states that predict one word all
            speak of that word first.

    Raises:
        SAEMismatchError: the directions have another width than the residual stream.
        ConfigError: `n` is below 1.
    """
    if n < 1:
        raise ConfigError(f"Got n={n}; expected 1 or more words.")
    if directions.shape[-1] != model.d_model:
        raise SAEMismatchError(
            f"The concepts have width {directions.shape[-1]}, the residual stream of {model.name} {model.d_model}; "
            "words exist only for concepts of the residual stream."
        )
    control = set(special_ids(model.tokenizer))
    found = []
    logits = output_logits(model, directions.float())
    if contrast:
        logits = logits / directions.float().norm(dim=1, keepdim=True).clamp_min(1e-30).to(logits.device)
        logits = logits - logits.mean(dim=0)
    for row in logits:
        words: dict[str, tuple[str, float]] = {}
        values, ids = row.sort(descending=True)
        for value, token in zip(values.tolist(), ids.tolist(), strict=True):
            word = None if token in control else as_word(model.tokenizer, token, min_letters)
            if word is not None:
                words.setdefault(word.casefold(), (word, value))
            if len(words) == n:
                break
        found.append(list(words.values()))
    return found


@lru_cache(maxsize=8)
def vocabulary_words(tokenizer: Any) -> tuple[str, ...]:  # noqa: ANN401
    """All whole words that a tokenizer has a token for: what random words are drawn from."""
    control = set(special_ids(tokenizer))
    words = (as_word(tokenizer, token) for token in range(len(tokenizer)) if token not in control)
    return tuple(dict.fromkeys(word for word in words if word is not None))
