"""Words are whole words in every script, and tokens are told from pieces of words by the tokenizer's convention."""

from __future__ import annotations

import unicodedata

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from sae_lens_multimodal.concepts.spans import token_offsets
from sae_lens_multimodal.concepts.text import find_words, is_word
from sae_lens_multimodal.concepts.vocabulary import as_word, vocabulary_words


@pytest.mark.parametrize(
    ("text", "word", "found"),
    [
        ("a train in training, a Train.", "train", ["train", "Train"]),
        ("the trains", "train", []),
        ("red-haired", "red", ["red"]),
        ("the cat's cat_1 cat", "cat", ["cat", "cat"]),
        ("I can't, he don\u2019t, we can", "can", ["can"]),
        ("I can't, he don\u2019t", "don", []),
        ("Cat's; the cats' bowl", "cat", ["Cat"]),
        ("they're here", "they", ["they"]),
        ("they're here, it's", "re", []),
        ("sous l'eau", "eau", ["eau"]),
        ("can't", "can't", ["can't"]),
        ("a hot   dog, hotdog, hot\ndog", "hot dog", ["hot   dog", "hot\ndog"]),
        ("кот, котик", "кот", ["кот"]),
        ("ein Mädchen", "Mädchen", ["Mädchen"]),
        ("el niño, niñoso", "niño", ["niño"]),
        ("一只猫和一只黑猫", "猫", ["猫", "猫"]),
        ("แมวสีดำ", "แมว", ["แมว"]),
        ("हिन्दी हि", "हि", ["हि"]),
        ("c++ and c", "c", ["c", "c"]),
    ],
)
def test_whole_words(text: str, word: str, found: list[str]) -> None:
    assert [text[start:stop] for start, stop in find_words(text, word)] == found


def test_marks_composed_or_apart_are_one_letter() -> None:
    apart = unicodedata.normalize("NFD", "un café noir")
    assert len(find_words(apart, "café")) == 1
    assert find_words(apart, "cafe") == []
    assert len(find_words("un café noir", unicodedata.normalize("NFD", "café"))) == 1


def test_only_the_region_is_searched() -> None:
    assert find_words("cat cat cat", "cat", 2, 8) == [(4, 7)]
    # What lies outside of the region does not bind letters to it: a caption may follow a template's text directly.
    assert find_words("xcat", "cat", 1) == [(1, 4)]


def byte_level() -> PreTrainedTokenizerFast:
    vocabulary = {token: index for index, token in enumerate(["Ġcat", "Ġpre", "dict", "s", "Ġ", "c", "a", "t", "Ã©"])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def test_pieces_of_words_are_no_words() -> None:
    tokenizer = byte_level()
    words = [as_word(tokenizer, index) for index in range(len(tokenizer))]
    assert words[:4] == ["cat", "pre", None, None]
    assert set(words[4:]) == {None}


def test_sentencepiece_and_wordpiece_conventions() -> None:
    tokens = ["▁the", "▁猫", "猫", "ing", "▁x", "▁1", "▁niño", "<0xE7>", "▁,"]
    unigram = Tokenizer(models.Unigram([(token, -float(i)) for i, token in enumerate(tokens)], 0))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=unigram)
    assert vocabulary_words(tokenizer) == ("the", "猫", "niño")
    pieces = Tokenizer(models.WordPiece({"[UNK]": 0, "cat": 1, "##cat": 2, "a": 3, "über": 4}, unk_token="[UNK]"))
    wordpiece = PreTrainedTokenizerFast(tokenizer_object=pieces, unk_token="[UNK]")
    assert vocabulary_words(wordpiece) == ("cat", "über")


def test_words_of_no_letters_are_none() -> None:
    assert not any(map(is_word, ("", "'", "12", "a1", "-", "\u0301", "\ufffd", "👍")))


def test_offsets_without_a_tokenizer_that_knows_them() -> None:
    """Those that are counted are those that the tokenizers library gives."""
    words = {"[UNK]": 0, "a": 1, "red": 2, "circle": 3, "##s": 4, ",": 5}
    fast = PreTrainedTokenizerFast(
        tokenizer_object=_with_blanks(models.WordPiece(words, unk_token="[UNK]")), unk_token="[UNK]"
    )
    text = "a red circles , a circle"
    slow = _Slow(fast)
    assert token_offsets(slow, text) == token_offsets(fast, text)
    assert [text[a:b] for _, a, b in token_offsets(slow, text)] == ["a", "red", "circle", "s", ",", "a", "circle"]


def _with_blanks(model: models.Model) -> Tokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer


class _Slow:
    """A tokenizer that refuses offsets, as those in Python do."""

    is_fast = False
    bos_token = None

    def __init__(self, fast: PreTrainedTokenizerFast) -> None:
        self._fast = fast
        self.all_special_ids: list[int] = []
        self.added_tokens_decoder: dict[int, object] = {}

    def __call__(self, text: str, **options: bool) -> dict[str, list[int]]:
        assert "return_offsets_mapping" not in options
        return {"input_ids": self._fast(text, **options)["input_ids"]}

    def convert_ids_to_tokens(self, token: int) -> str:
        return str(self._fast.convert_ids_to_tokens(token))

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        return " ".join(tokens).replace(" ##", "")
