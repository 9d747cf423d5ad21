"""Where a constraint ends, in rows of several lengths."""

from __future__ import annotations

import pytest

from sae_lens_multimodal.adapters.model import VisionLanguageModel
from sae_lens_multimodal.editing.places import constraint_ends
from sae_lens_multimodal.errors import SelectionError
from sae_lens_multimodal.hooks.places import BoxTokens, ImageTokens
from tests.editing.conftest import ask


def test_ends_of_words_pictures_and_positions(tiny: VisionLanguageModel) -> None:
    batch = tiny.encode([ask("is this a red circle ? this"), ask("is this red ?", colour=None)])
    tokens = [[one.strip() for one in tiny.token_strings(row)] for row in batch["input_ids"]]

    def ends(constraint: object) -> list[str]:
        found = constraint_ends(tiny, batch, constraint).tolist()  # type: ignore[arg-type]
        return [row[place] for row, place in zip(tokens, found, strict=True)]

    assert ends("Is  this") == ["this", "this"]
    assert ends(["red circle", "red"]) == ["circle", "red"]
    # the last occurrence
    assert int(constraint_ends(tiny, batch, "this")[0]) == len(tokens[0]) - 2
    assert ends(-1) == ["<assistant>", "<assistant>"]
    assert ends(-2) == ["this", "?"]
    assert ends(0) == ["<s>", "<s>"]
    picture = int(batch.layout.is_image[0].nonzero().max())
    first = tiny.encode([ask()])
    assert int(constraint_ends(tiny, first, ImageTokens())[0]) == int(first.layout.is_image[0].nonzero().max())
    left = BoxTokens((0, 0, 48, 48), view="base")
    assert int(constraint_ends(tiny, first, left)[0]) == int(left.mask(first.layout)[0].nonzero().max())
    assert picture < len(tokens[0])


def test_what_is_not_there(tiny: VisionLanguageModel) -> None:
    batch = tiny.encode([ask()])
    for wrong, says in (("blue", "not in the prompt"), ("", "not in the prompt"), (10_000, "Got position 10000")):
        with pytest.raises(SelectionError, match=says):
            constraint_ends(tiny, batch, wrong)
    with pytest.raises(SelectionError, match="2 constraints for 1 prompts"):
        constraint_ends(tiny, batch, ["this", "this"])
