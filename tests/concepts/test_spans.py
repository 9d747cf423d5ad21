"""Spans of tokens spell the word, whatever the tokenizer makes of it, behind pictures and within a chat."""

from __future__ import annotations

from typing import Any

import pytest
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlavaNextProcessor, PreTrainedTokenizerFast

from sae_lens_multimodal.adapters.encode import encode
from sae_lens_multimodal.adapters.family import Family
from sae_lens_multimodal.adapters.random_models import CHAT_TEMPLATE, CONTROL, random_llava_next
from sae_lens_multimodal.adapters.registry import find_family
from sae_lens_multimodal.concepts.spans import _matched, caption_pieces, caption_regions, word_spans

CAPTIONS = (
    "a train in training near the trains and a TRAIN.",
    "Ein Mädchen mit niño, café und naïveté.",
    "一只猫和一只黑猫在这里",
    "red-haired cat's cat, catalogue; cat",
    "  blanks   before a  red   circle ",
)


def bpe(kind: str) -> PreTrainedTokenizerFast:
    """A small tokenizer of pieces, byte-level or with SentencePiece's blanks."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    trainer_options: dict[str, Any] = {"vocab_size": 320, "special_tokens": list(CONTROL), "show_progress": False}
    if kind == "bytes":
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer_options["initial_alphabet"] = pre_tokenizers.ByteLevel.alphabet()
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        tokenizer.decoder = decoders.Metaspace()
    tokenizer.train_from_iterator(CAPTIONS, trainers.BpeTrainer(**trainer_options))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        extra_special_tokens={"image_token": "<image>"},
    )


@pytest.fixture(scope="module", params=["bytes", "blanks"])
def family(request: pytest.FixtureRequest) -> Family:
    model, processor = random_llava_next()
    changed = LlavaNextProcessor(
        processor.image_processor,
        bpe(request.param),
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )
    return find_family("llava_next", name="tiny")(model.config, changed)


def talk(caption: str) -> list[dict[str, Any]]:
    """A question with a picture in which the word occurs as well, and the caption as the answer."""
    asked = [{"type": "image", "image": Image.new("RGB", (90, 40))}, {"type": "text", "text": f"is this {caption} ?"}]
    return [
        {"role": "user", "content": asked},
        {"role": "assistant", "content": [{"type": "text", "text": caption}]},
    ]


@pytest.mark.parametrize(
    ("caption", "word", "found"),
    [
        (CAPTIONS[0], "train", ["train", "TRAIN"]),
        (CAPTIONS[1], "café", ["café"]),
        (CAPTIONS[1], "Mädchen", ["Mädchen"]),
        (CAPTIONS[3], "cat", ["cat", "cat", "cat"]),
        (CAPTIONS[4], "red circle", ["red   circle"]),
        (CAPTIONS[4], "circl", []),
    ],
)
def test_the_tokens_spell_the_word(family: Family, caption: str, word: str, found: list[str]) -> None:
    tokenizer = family.processor.tokenizer
    batch = encode(family, [talk(caption)])
    tokens = batch["input_ids"][0].tolist()
    spans = word_spans(family, talk(caption), word, tokens)
    texts = [tokenizer.decode(tokens[span.start : span.stop]).strip() for span in spans]
    assert [text.strip("-,;.'s ") for text in texts] == [text.strip("s") for text in found]
    # All lie in the answer, behind the question.
    assert all(span.start > tokens.index(tokenizer.convert_tokens_to_ids("<assistant>")) for span in spans)


def test_a_token_that_goes_beyond_the_word_is_taken_once(family: Family) -> None:
    tokenizer = family.processor.tokenizer
    tokens = encode(family, [talk(CAPTIONS[2])])["input_ids"][0].tolist()
    spans = word_spans(family, talk(CAPTIONS[2]), "猫", tokens)
    assert 1 <= len(spans) == len(set(spans)) <= 2
    assert all("猫" in tokenizer.decode(tokens[span.start : span.stop]) for span in spans)


def test_every_role_can_be_the_caption(family: Family) -> None:
    tokens = encode(family, [talk("a cat")])["input_ids"][0].tolist()
    assistant, user, both = (
        word_spans(family, talk("a cat"), "cat", tokens, role=role) for role in ("assistant", "user", "any")
    )
    assert (len(assistant), len(user), sorted(both)) == (1, 1, sorted([*assistant, *user]))
    assert [piece.text for piece in caption_pieces(talk("a cat")[:1])] == ["is this a cat ?"]


def test_regions_are_the_captions_own_text(family: Family) -> None:
    text, ((start, stop),) = caption_regions(family, talk("a cat"), "auto")
    assert text[start:stop] == "a cat"
    assert text.find("a cat") < start


def test_tokens_that_a_processor_puts_around_pictures_do_not_matter(family: Family) -> None:
    tokenizer = family.processor.tokenizer
    plain = [2, 6, 50, 51, 52, 53]
    given = [2, 99, 6, 6, 6, 99, 50, 51, 98, 52, 53]
    assert _matched(tokenizer, plain, given) == {2: 6, 3: 7, 4: 9, 5: 10}
