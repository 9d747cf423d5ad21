"""States are gathered at the right tokens of the right rows, and a killed run leaves what an unbroken one leaves."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from sae_lens_multimodal.adapters.model import VisionLanguageModel
from sae_lens_multimodal.concepts import gather
from sae_lens_multimodal.concepts.gather import Place, gather_states
from sae_lens_multimodal.concepts.states import ConceptStates, StateShard, StateWriter
from sae_lens_multimodal.data.rows import row_to_prompt
from sae_lens_multimodal.errors import ConfigError, DatasetError, SelectionError, StoreError
from sae_lens_multimodal.hooks.read import read_activations
from tests.concepts.concept_samples import HOOK, WORD


def by_hand(model: VisionLanguageModel, row: dict[str, Any]) -> tuple[list[str], torch.Tensor]:
    """A row's tokens and what a plain PyTorch hook sees of them."""
    batch = model.encode([row_to_prompt(row).messages])
    seen: list[torch.Tensor] = []
    module = model._module.get_submodule("model.language_model.layers.1")
    handle = module.register_forward_hook(lambda _, __, output: seen.append(output))
    with torch.no_grad():
        model._module(**batch)
    handle.remove()
    return [token.strip() for token in model.token_strings(batch["input_ids"][0])], seen[0][0]


def test_the_states_before_a_word_are_those_of_a_plain_hook(
    model: VisionLanguageModel, rows: list[dict[str, Any]], states: ConceptStates
) -> None:
    expected, holding = [], []
    for index, row in enumerate(rows):
        tokens, values = by_hand(model, row)
        places = [place for place, token in enumerate(tokens) if token == WORD]
        expected += [values[place - 1] for place in places]
        holding += [index] * len(places)
    assert states.rows == holding
    assert len(states) > 8
    assert torch.allclose(states.states, torch.stack(expected), atol=1e-4)
    assert all(WORD in caption.split() for caption in states.captions)
    assert states.n_without == len(rows) - len(set(holding))
    assert states.report.kept == len(rows)


@pytest.mark.parametrize(
    ("at", "offsets"),
    [
        ("before", [-1]),
        ("predicting", [-1, 0]),
        ("first", [0]),
        ("last", [1]),
        ("at", [0, 1]),
        ((-2, 3), [-2, -1, 0, 1, 2]),
    ],
)
def test_places_of_a_phrase(
    model: VisionLanguageModel, rows: list[dict[str, Any]], at: Place, offsets: list[int]
) -> None:
    found = gather_states(model, rows, "solid  CIRCLE", hook_name=HOOK, at=at, progress=False)
    row = found.rows[0]
    tokens, values = by_hand(model, rows[row])
    first = next(i for i in range(len(tokens)) if tokens[i : i + 2] == ["solid", WORD])
    own = [first + offset for offset in offsets]
    assert found.shard.position[: len(own)].tolist() == own
    assert torch.allclose(found.states[: len(own)], values[own], atol=1e-4)


def test_a_mean_is_one_state(model: VisionLanguageModel, rows: list[dict[str, Any]]) -> None:
    settings: dict[str, Any] = {"hook_name": HOOK, "progress": False}
    mean = gather_states(model, rows, "solid circle", at="mean", **settings)
    parts = gather_states(model, rows, "solid circle", at="at", **settings)
    assert torch.allclose(mean.states, parts.states.reshape(len(mean), 2, -1).mean(1), atol=1e-5)


@pytest.mark.parametrize("word", ["circ", "ircle", "solidcircle", "circle square"])
def test_parts_of_words_are_not_found(model: VisionLanguageModel, rows: list[dict[str, Any]], word: str) -> None:
    with pytest.raises(DatasetError, match="No states of"):
        gather_states(model, rows, word, hook_name=HOOK, progress=False)


def test_a_question_is_not_a_caption(model: VisionLanguageModel, rows: list[dict[str, Any]]) -> None:
    with pytest.raises(DatasetError, match=f"{len(rows)} rows do not hold the word"):
        gather_states(model, rows, "picture", hook_name=HOOK, progress=False)
    assert len(gather_states(model, rows, "picture", role="user", hook_name=HOOK, progress=False)) == len(rows)


def test_a_caption_column_becomes_the_answer(model: VisionLanguageModel, rows: list[dict[str, Any]]) -> None:
    question = "what is in the picture ?"
    captioned = [{"image": row["images"][0], "caption": row["messages"][1]["content"][0]["text"]} for row in rows]
    settings: dict[str, Any] = {"hook_name": HOOK, "progress": False}
    asked = gather_states(model, captioned, WORD, question=question, **settings)
    assert torch.allclose(asked.states, gather_states(model, rows, WORD, **settings).states, atol=1e-5)
    assert not torch.allclose(asked.states, gather_states(model, captioned, WORD, **settings).states, atol=1e-2)


def test_batches_change_nothing(model: VisionLanguageModel, rows: list[dict[str, Any]], states: ConceptStates) -> None:
    single = gather_states(model, rows, WORD, hook_name=HOOK, every=True, batch_size=1, progress=False)
    assert single.rows == states.rows
    assert torch.allclose(single.states, states.states, atol=1e-4)


def test_bad_rows_are_skipped_and_counted(model: VisionLanguageModel, rows: list[dict[str, Any]]) -> None:
    broken = {**rows[0], "images": [{"bytes": b"no picture", "path": None}]}
    broken["messages"] = [broken["messages"][0], {"role": "assistant", "content": "red solid circle"}]
    found = gather_states(model, [broken, *rows], WORD, hook_name=HOOK, progress=False)
    assert dict(found.report.reasons) == {"picture cannot be opened": 1}
    assert found.rows[0] > 0


def test_a_template_that_changes_the_caption_is_told(
    model: VisionLanguageModel, rows: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    template = model.processor.chat_template.replace("{{ part['text'] }}", "{{ part['text'] | upper }}")
    assert template != model.processor.chat_template
    monkeypatch.setattr(model.processor, "chat_template", template)
    with pytest.raises(DatasetError, match="the chat template changes the caption's text"):
        gather_states(model, rows, WORD, hook_name=HOOK, progress=False)


class Killed(BaseException):
    """What a signal would be."""


def test_a_killed_run_goes_on_and_leaves_the_same_files(
    model: VisionLanguageModel, rows: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: dict[str, Any] = {"hook_name": HOOK, "batch_size": 2, "shard_states": 3, "every": True, "progress": False}
    whole = gather_states(model, rows, WORD, output=tmp_path / "whole", **settings)
    add = StateWriter.add
    for _ in range(3):
        left = iter(range(3))

        def dying(writer: StateWriter, shard: StateShard, left: Any = left) -> None:
            add(writer, shard)
            if next(left, None) is None:
                raise Killed

        monkeypatch.setattr(StateWriter, "add", dying)
        try:
            gather_states(model, rows, WORD, output=tmp_path / "broken", **settings)
        except Killed:
            with pytest.raises(StoreError, match="unfinished gathering"):
                ConceptStates.load(tmp_path / "broken")
    monkeypatch.undo()
    again = gather_states(model, rows, WORD, output=tmp_path / "broken", **settings)
    names = sorted(path.name for path in (tmp_path / "whole").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "broken").iterdir())
    assert len(names) > 3
    for name in names:
        if name.endswith(".safetensors"):
            assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "broken" / name).read_bytes()
    assert torch.equal(again.states, whole.states)
    assert again.captions == whole.captions
    assert (again.report.to_dict(), again.n_without) == (whole.report.to_dict(), whole.n_without)


def test_a_finished_run_is_returned_and_another_refused(
    model: VisionLanguageModel, rows: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: dict[str, Any] = {"hook_name": HOOK, "output": tmp_path / "states", "progress": False}
    first = gather_states(model, rows[:8], WORD, **settings)
    monkeypatch.setattr(StateWriter, "add", None)
    assert torch.equal(gather_states(model, rows[:8], WORD, **settings).states, first.states)
    with pytest.raises(StoreError, match="word='circle', not 'star'"):
        gather_states(model, rows[:8], "star", **settings)
    with pytest.raises(StoreError, match="resume is off"):
        gather_states(model, rows[:8], WORD, resume=False, **settings)


def test_noise_takes_the_place_of_pictures(
    model: VisionLanguageModel, rows: list[dict[str, Any]], states: ConceptStates
) -> None:
    settings: dict[str, Any] = {"hook_name": HOOK, "every": True, "pictures": "noise", "progress": False}
    noise, again, other = (gather_states(model, rows, WORD, seed=seed, **settings) for seed in (0, 0, 1))
    assert torch.equal(noise.shard.position, states.shard.position)
    assert torch.equal(noise.states, again.states)
    assert not torch.allclose(noise.states, other.states, atol=1e-3)
    assert not torch.allclose(noise.states, states.states, atol=1e-1)


@pytest.mark.parametrize("rare", [False, True])
def test_a_run_is_saved_long_before_a_shard_is_full(
    model: VisionLanguageModel,
    rows: list[dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    rare: bool,
) -> None:
    """With the settings as they are by themselves; `rare`: even where no batch is ever full."""
    if rare:
        monkeypatch.setattr("sae_lens_multimodal.concepts.gather._STRETCH_ROWS", 4)
    clock = iter(range(0, 10**6, 31))
    monkeypatch.setattr("sae_lens_multimodal.concepts.states.time.monotonic", lambda: next(clock))
    whole = gather_states(model, rows, WORD, hook_name=HOOK, output=tmp_path / "whole", progress=False)
    read = {"all": 0, "again": 0}

    def dying(raws: Any, key: str) -> Any:
        for place, raw in raws:
            read[key] += 1
            if key == "all" and place == len(rows) - 3:
                raise Killed
            yield place, raw

    numbered = gather.numbered_rows
    for key in read:
        monkeypatch.setattr(gather, "numbered_rows", lambda rows, skip, key=key: dying(numbered(rows, skip), key))
        with suppress(Killed):
            again = gather_states(model, rows, WORD, hook_name=HOOK, output=tmp_path / "broken", progress=False)
    # Of the dataset's first row a fingerprint is taken, each time.
    assert 1 < read["again"] < len(rows) - (14 if rare else 0)
    assert torch.equal(again.states, whole.states)
    assert (again.rows, again.n_without) == (whole.rows, whole.n_without)
    assert again.report.to_dict() == whole.report.to_dict()
    assert sorted(one.name for one in (tmp_path / "broken").iterdir()) == ["manifest.json", "states-00000.safetensors"]


def test_only_some_rows_are_read(model: VisionLanguageModel, rows: list[dict[str, Any]], states: ConceptStates) -> None:
    chosen = sorted(set(states.rows))[1:3]
    some = gather_states(model, rows, WORD, hook_name=HOOK, every=True, only_rows=chosen, progress=False)
    own = torch.isin(states.shard.row, torch.tensor(chosen))
    assert set(some.rows) == set(chosen)
    assert some.report.read == 2
    assert torch.allclose(some.states, states.states[own], atol=1e-4)


def test_what_changes_no_state_may_differ_in_a_resumed_run(
    model: VisionLanguageModel, rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    settings: dict[str, Any] = {"hook_name": HOOK, "output": tmp_path / "own", "progress": False}
    first = gather_states(model, rows[:8], WORD, seed=0, batch_size=2, **settings)
    assert torch.equal(gather_states(model, rows[:8], WORD, seed=1, batch_size=4, **settings).states, first.states)
    assert first.settings["dtype"] == "float32"
    with pytest.raises(StoreError, match="image_folder=None, not 'elsewhere'"):
        gather_states(model, rows[:8], WORD, image_folder="elsewhere", **settings)
    settings |= {"output": tmp_path / "noise", "pictures": "noise"}
    gather_states(model, rows[:8], WORD, seed=0, **settings)
    with pytest.raises(StoreError, match="seed=0, not 1"):
        gather_states(model, rows[:8], WORD, seed=1, **settings)


def test_states_that_are_not_finite_are_skipped_and_counted(
    model: VisionLanguageModel, rows: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(model: Any, batch: Any, hook: str) -> dict[str, torch.Tensor]:
        values = read_activations(model, batch, hook)
        values[hook][0] = torch.nan
        return values

    monkeypatch.setattr(gather, "read_activations", broken)
    found = gather_states(model, rows, WORD, hook_name=HOOK, progress=False)
    assert found.report.reasons["states are not finite"] > 0
    assert found.states.isfinite().all()


def test_splits_share_no_picture(model: VisionLanguageModel, rows: list[dict[str, Any]]) -> None:
    holding = [row for row in rows if WORD in row["messages"][1]["content"][0]["text"].split()][:6]
    captions = [one for row in holding for one in (row, row, row)]
    found = gather_states(model, captions, WORD, hook_name=HOOK, progress=False)
    for seed in range(4):
        one, other = found.split(0.5, seed=seed)
        pictures = [{row // 3 for row in part.rows} for part in (one, other)]
        assert not pictures[0] & pictures[1]
        assert len(pictures[0]) == len(pictures[1]) == 3


def test_rows_without_pictures_are_linked_by_their_caption(model: VisionLanguageModel) -> None:
    texts = [
        [
            {"role": "user", "content": "what is in the picture ?"},
            {"role": "assistant", "content": f"{colour} solid circle"},
        ]
        for colour in ("red", "blue", "red", "blue")
    ]
    found = gather_states(model, [{"messages": one} for one in texts], WORD, hook_name=HOOK, progress=False)
    assert sorted(sorted(part.rows) for part in found.split(0.5)) == [[0, 2], [1, 3]]


def test_what_cannot_be_held_out_is_said(
    model: VisionLanguageModel, rows: list[dict[str, Any]], states: ConceptStates, caplog: pytest.LogCaptureFixture
) -> None:
    for share in (0, 1.5):
        with pytest.raises(ConfigError, match=f"share={share}"):
            states.split(share)
    assert [len(part) for part in states.split(1)] == [len(states), 0]
    row = rows[states.rows[0]]
    one, other = gather_states(model, [row] * 3, WORD, hook_name=HOOK, progress=False).split(0.5)
    assert (len(one), len(other)) == (3, 0)
    assert "linked by the pictures they share" in caplog.text


def test_splits_share_no_row(states: ConceptStates) -> None:
    one, other = states.split(0.6, seed=1)
    assert not set(one.rows) & set(other.rows)
    assert len(one) + len(other) == len(states)
    assert [states.captions[states.rows.index(row)] for row in one.rows][:1] == one.captions[:1]


def test_mistakes_are_told(model: VisionLanguageModel, rows: list[dict[str, Any]]) -> None:
    with pytest.raises(ConfigError, match="empty word"):
        gather_states(model, rows, " ")
    with pytest.raises(ConfigError, match="at='after'"):
        gather_states(model, rows, WORD, at="after")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="batch_size=0"):
        gather_states(model, rows, WORD, batch_size=0)
    with pytest.raises(SelectionError, match="sees pictures"):
        gather_states(model, rows, WORD, hook_name="vision.blocks.0.hook_resid_post")
