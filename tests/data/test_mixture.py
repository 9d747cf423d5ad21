"""A mixture gives the rows that datasets' own interleaving gives, and can be entered at any row."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import datasets
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sae_lens_multimodal.data.mixture import Member, Mixture, StopRule, open_mixture
from sae_lens_multimodal.data.rows import SkipReport
from sae_lens_multimodal.data.stream import read_prompts
from sae_lens_multimodal.errors import ConfigError, DatasetError
from tests.data.data_samples import png

STOPS: list[StopRule] = ["all_exhausted", "first_exhausted", "all_exhausted_without_replacement"]


def texts(name: str, count: int) -> datasets.Dataset:
    return datasets.Dataset.from_dict({"text": [f"{name}{index}" for index in range(count)]})


def streamed(dataset: datasets.Dataset) -> datasets.IterableDataset:
    return dataset.to_iterable_dataset()


FORMS: dict[str, Callable[[datasets.Dataset], Any]] = {"map": lambda one: one, "stream": streamed, "list": list}


def mixed(rows: list[Any], weights: list[float], seed: int, stop: StopRule) -> Mixture:
    members = [Member(rows=one, weight=w, name=f"m{i}") for i, (one, w) in enumerate(zip(rows, weights, strict=True))]
    return Mixture(tuple(members), seed, stop)


def read(mixture: Mixture, skip: int = 0) -> list[str]:
    return [prompt.text for prompt in read_prompts(mixture, skip_rows=skip)]


@pytest.mark.parametrize("stop", STOPS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("seed", [0, 7])
def test_the_order_is_that_of_datasets(form: str, stop: StopRule, seed: int) -> None:
    plain = [texts("a", 7), texts("b", 20), texts("c", 3)]
    weights = [2.0, 5.0, 1.0]
    expected = datasets.interleave_datasets(
        plain, probabilities=[weight / 8 for weight in weights], seed=seed, stopping_strategy=stop
    )["text"]
    assert read(mixed([FORMS[form](one) for one in plain], weights, seed, stop)) == list(expected)


@pytest.mark.parametrize("stop", STOPS)
def test_streams_are_mixed_as_datasets_mixes_streams(stop: StopRule) -> None:
    plain = [streamed(texts("a", 5)), streamed(texts("b", 9))]
    expected = datasets.interleave_datasets(plain, probabilities=[0.25, 0.75], seed=3, stopping_strategy=stop)
    assert read(mixed(plain, [1, 3], 3, stop)) == [row["text"] for row in expected]


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 6), min_size=1, max_size=3),
    forms=st.lists(st.sampled_from(sorted(FORMS)), min_size=3, max_size=3),
    weights=st.lists(st.floats(0.2, 5), min_size=3, max_size=3),
    stop=st.sampled_from(STOPS),
    seed=st.integers(0, 1000),
    skip=st.integers(0, 12),
)
def test_it_can_be_entered_at_any_row(
    lengths: list[int], forms: list[str], weights: list[float], stop: StopRule, seed: int, skip: int
) -> None:
    rows = [FORMS[form](texts("abc"[i], n)) for i, (n, form) in enumerate(zip(lengths, forms, strict=False))]
    mixture = mixed(rows, weights[: len(rows)], seed, stop)
    assert read(mixture, skip) == read(mixture)[skip:]


def test_rows_that_are_skipped_are_not_decoded_and_members_may_differ() -> None:
    pictures = datasets.Dataset.from_list([{"image": {"bytes": png(), "path": None}, "caption": "x"}] * 4)
    members = [pictures.cast_column("image", datasets.Image()), [{"messages": [{"role": "user", "content": "hi"}]}]]
    prompts = list(read_prompts(mixed(members, [1, 1], 0, "all_exhausted_without_replacement")))
    assert sorted(prompt.text for prompt in prompts) == ["<image> x"] * 4 + ["hi"]
    assert [prompt.row for prompt in prompts] == [0, 1, 2, 3, 4]
    by_member = {prompt.dataset: prompt.text for prompt in prompts}
    assert by_member == {"m0": "<image> x", "m1": "hi"}


def test_bad_rows_are_named_by_their_member_and_their_own_number() -> None:
    good = [{"text": f"t{index}"} for index in range(6)]
    broken = [{"image": b"no picture"} if index == 3 else {"text": "x"} for index in range(6)]
    report = SkipReport()
    list(read_prompts(mixed([good, broken], [1, 1], 5, "all_exhausted_without_replacement"), report=report))
    ((number, detail),) = report.examples["picture cannot be opened"]
    assert (number, detail.split(":")[0]) == (3, "m1")
    assert (report.read, report.kept) == (12, 11)


def test_a_members_own_image_folder(tmp_path: Any) -> None:
    (tmp_path / "a.png").write_bytes(png())
    (tmp_path / "rows.jsonl").write_text('{"image": "a.png", "text": "x"}\n')
    entry = {"path": str(tmp_path / "rows.jsonl"), "weight": 1, "image_folder": str(tmp_path)}
    assert read(open_mixture([entry])) == ["<image> x"]


def test_what_cannot_be_mixed_says_so() -> None:
    for entries, message in (
        ([], "empty"),
        ([{"path": "a"}], "path and weight"),
        ([{"path": "a", "weight": 0}], "weight 0; expected a number above 0"),
        ([{"path": "a", "weight": 1, "wieght": 2}], "wieght"),
        (["a"], "path and weight"),
    ):
        with pytest.raises(ConfigError, match=message):
            open_mixture(entries)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="mixture_stop is 'never'"):
        mixed([texts("a", 1)], [1], 0, "never")  # type: ignore[arg-type]
    with pytest.raises(DatasetError, match="m1 has no rows"):
        read(mixed([texts("a", 1), []], [1, 1], 0, "all_exhausted"))
    with pytest.raises(DatasetError, match="m1 has no rows"):
        read(mixed([texts("a", 1), streamed(texts("b", 1)).skip(1)], [1, 1], 0, "all_exhausted"))
    with pytest.raises(DatasetError, match="m0: Found the columns foo"):
        read(mixed([[{"foo": 1}]], [1], 0, "all_exhausted"))
