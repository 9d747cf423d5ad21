"""A run that is killed at any moment and started again ends with the same weights, bit for bit."""

from __future__ import annotations

import errno
import json
import os
import random
import resource
import signal
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sae_lens import SAE
from safetensors.torch import load_file

from sae_lens_multimodal.adapters.model import VisionLanguageModel
from sae_lens_multimodal.errors import DatasetError, StoreError
from sae_lens_multimodal.training import checkpoint, output
from sae_lens_multimodal.training.checkpoint import latest_checkpoint, run_id
from sae_lens_multimodal.training.randomness import random_state, restore_random_state, seeded
from sae_lens_multimodal.training.runner import MultimodalSAETrainingRunner
from sae_lens_multimodal.training.trainer import MultimodalSAETrainer
from sae_lens_multimodal.training.tree_file import load_tree, save_tree

Rows = list[dict[str, Any]]

STEPS = 12
SETTINGS: dict[str, dict[str, Any]] = {
    "topk": {},
    "prefetch": {"prefetch_llm_batches": 3},
    "mixing, several epochs": {"activations_mixing_fraction": 0.5, "n_batches_in_buffer": 3, "n_rows": 14},
    "normalised batchtopk": {
        "sae": {"architecture": "batchtopk", "normalize_activations": "expected_average_only_in"},
        "n_batches_for_norm_estimate": 3,
        "prefetch_llm_batches": 1,
    },
    "whitened": {"sae": {"normalize_activations": "covariance_whitening"}, "n_batches_for_norm_estimate": 3},
    "jumprelu, cosine": {
        "sae": {"architecture": "jumprelu", "k": None, "l0_coefficient": 0.1, "l0_warm_up_steps": 6},
        "lr_scheduler_name": "cosineannealing",
        "lr_warm_up_steps": 3,
        "lr_decay_steps": 3,
        "token_shares": None,
    },
    "prompts too long": {"context_size": 60, "token_shares": {"text": 1.0}},
}


def settings_of(name: str, folder: Path, **changes: Any) -> tuple[dict[str, Any], int]:
    settings = {
        "training_tokens": 64 * STEPS,
        "n_checkpoints": 3,
        "checkpoint_path": str(folder / "checkpoints"),
        "resume_from_checkpoint": "latest",
        "output_path": str(folder / "sae"),
        "feature_sampling_window": 5,
        "dead_feature_window": 3,
        "activations_mixing_fraction": 0.3,
        **SETTINGS[name],
        **changes,
    }
    return settings, settings.pop("n_rows", 40)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "sae" / "sae_weights.safetensors")


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def in_a_process(work: Callable[[], object]) -> int:
    """Run in a process of its own; the number of the signal that ended it, or minus its exit status."""
    child = os.fork()
    if child == 0:
        try:
            work()
            os._exit(0)
        except BaseException:  # noqa: BLE001 - the child must never return into pytest
            traceback.print_exc()
            os._exit(3)
    status = os.waitpid(child, 0)[1]
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else -os.WEXITSTATUS(status)


def die(*_: object, **__: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def kill_in_step(at: int) -> None:
    step = MultimodalSAETrainer.step

    def killing(self: MultimodalSAETrainer, batch: torch.Tensor) -> Any:
        result = step(self, batch)
        if self.n_training_steps == at:
            die()
        return result

    MultimodalSAETrainer.step = killing  # type: ignore[method-assign]


def kill_in_checkpoint(number: int, *, written: bool) -> None:
    put, writes = checkpoint._put_in_place, []

    def killing(staged: Path, folder: Path) -> None:
        writes.append(folder)
        if written:
            put(staged, folder)
        if len(writes) == number:
            die()
        if not written:
            put(staged, folder)

    checkpoint._put_in_place = killing


def kill_at_the_end() -> None:
    output.write_manifest = die


MOMENTS: dict[str, Callable[[], None]] = {
    "before the first checkpoint": lambda: kill_in_step(1),
    "right after a checkpoint": lambda: kill_in_checkpoint(2, written=True),
    "while a checkpoint is written": lambda: kill_in_checkpoint(2, written=False),
    "between checkpoints": lambda: kill_in_step(8),
    "while the SAE is saved": kill_at_the_end,
}


def train(model: VisionLanguageModel, config: Any, rows: Rows) -> SAE[Any]:
    return MultimodalSAETrainingRunner(config, override_dataset=rows, override_model=model).run()


def uninterrupted(
    name: str, model: VisionLanguageModel, make_config: Any, rows: Rows, folder: Path
) -> dict[str, torch.Tensor]:
    settings, n_rows = settings_of(name, folder, resume_from_checkpoint=None, n_checkpoints=0, checkpoint_path=None)
    train(model, make_config(**settings), rows[:n_rows])
    return weights(folder)


@pytest.mark.parametrize("name", SETTINGS)
def test_killed_runs_end_with_the_same_weights(
    model: VisionLanguageModel, make_config: Any, rows: Rows, tmp_path: Path, name: str
) -> None:
    expected = uninterrupted(name, model, make_config, rows, tmp_path / "whole")
    settings, n_rows = settings_of(name, tmp_path / "killed")

    def start(before: Callable[[], None]) -> int:
        before()
        train(model, make_config(**settings), rows[:n_rows])
        return 0

    # The same command again and again, killed at a later moment each time, until nothing kills it.
    for moment in ("before the first checkpoint", "right after a checkpoint", "between checkpoints"):
        assert in_a_process(lambda moment=moment: start(MOMENTS[moment])) == signal.SIGKILL
    assert latest_checkpoint(make_config(**settings).checkpoint_path) is not None
    assert not (tmp_path / "killed" / "sae").exists()
    train(model, make_config(**settings), rows[:n_rows])
    assert equal(weights(tmp_path / "killed"), expected)


@pytest.mark.parametrize("moment", ["while a checkpoint is written", "while the SAE is saved"])
@pytest.mark.parametrize("save_final", [False, True])
def test_kills_while_something_is_written(
    model: VisionLanguageModel, make_config: Any, rows: Rows, tmp_path: Path, moment: str, save_final: bool
) -> None:
    name = "normalised batchtopk"
    expected = uninterrupted(name, model, make_config, rows, tmp_path / "whole")
    settings, n_rows = settings_of(name, tmp_path / "killed", save_final_checkpoint=save_final)
    config = make_config(**settings)

    def start() -> None:
        MOMENTS[moment]()
        train(model, config, rows[:n_rows])

    assert in_a_process(start) == signal.SIGKILL
    checkpoints = Path(config.checkpoint_path)
    last = latest_checkpoint(checkpoints)
    assert last is not None
    if moment == "while a checkpoint is written":
        assert last.name == "256"  # the one before the one that was being written
        assert any(child.name.startswith(".partial-") for child in checkpoints.iterdir())
    elif save_final:
        assert last.name == f"final_{64 * STEPS}"
    train(model, config, rows[:n_rows])
    assert equal(weights(tmp_path / "killed"), expected)
    assert not any(child.name.startswith(".") for child in checkpoints.iterdir())


def test_a_finished_run_that_is_started_again_gives_its_sae(
    model: VisionLanguageModel, make_config: Any, rows: Rows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, n_rows = settings_of("topk", tmp_path)
    first = train(model, make_config(**settings), rows[:n_rows])
    monkeypatch.setattr(MultimodalSAETrainer, "fit", die)
    again = train(model, make_config(**settings), rows[:n_rows])
    assert equal(first.state_dict(), again.state_dict())
    with pytest.raises(StoreError, match="holds an earlier run"):
        train(model, make_config(**{**settings, "lr": 5e-4}), rows[:n_rows])


def test_latest_goes_on_with_its_own_run_only(make_config: Any, tmp_path: Path) -> None:
    settings, _ = settings_of("topk", tmp_path)
    first, again = (make_config(**settings).checkpoint_path for _ in range(2))
    assert first == again
    for change in ({"lr": 5e-4}, {"seed": 3}, {"sae": {"k": 8}}, {"training_tokens": 64}, {"token_shares": None}):
        assert make_config(**{**settings, **change}).checkpoint_path != first
    for change in ({"progress": True}, {"n_checkpoints": 9}, {"prefetch_llm_batches": 2}, {"output_path": "x"}):
        assert make_config(**{**settings, **change}).checkpoint_path == first
    assert run_id(make_config(**settings).to_dict()) == Path(first).name


def test_the_last_whole_checkpoint_is_found(tmp_path: Path) -> None:
    assert latest_checkpoint(tmp_path / "nowhere") is None
    for name in ("64", "128", "1024", "final_1024", ".partial-2048-1", "notes"):
        (tmp_path / name).mkdir()
        if name != "128":
            (tmp_path / name / "manifest.json").write_text("{}")
    (tmp_path / "4096").mkdir()
    found = latest_checkpoint(tmp_path)
    assert found is not None
    assert found.name == "final_1024"


def test_a_checkpoint_holds_no_pickle(model: VisionLanguageModel, make_config: Any, rows: Rows, tmp_path: Path) -> None:
    settings, n_rows = settings_of("topk", tmp_path)
    config = make_config(**settings)
    train(model, config, rows[:n_rows])
    folder = latest_checkpoint(config.checkpoint_path)
    assert folder is not None
    assert {path.suffix for path in folder.iterdir()} == {".safetensors", ".json"}
    for path in folder.glob("*.json"):
        json.loads(path.read_text())
    assert SAE.load_from_disk(folder).cfg.d_sae == 64


def test_a_checkpoint_of_another_dataset_is_refused(
    model: VisionLanguageModel, make_config: Any, rows: Rows, tmp_path: Path
) -> None:
    settings, _ = settings_of("topk", tmp_path, output_path=None)
    train(model, make_config(**settings), rows[:40])
    with pytest.raises(StoreError, match="trained on a dataset of 36 rows, this run has 27"):
        train(model, make_config(**settings), rows[:30])


def test_killed_from_outside_at_random_moments(
    model: VisionLanguageModel, make_config: Any, rows: Rows, tmp_path: Path
) -> None:
    expected = uninterrupted("prefetch", model, make_config, rows, tmp_path / "whole")
    settings, n_rows = settings_of("prefetch", tmp_path / "killed", n_checkpoints=STEPS - 1)
    moments = random.Random(0)
    killed = 0
    for attempt in range(60):
        child = os.fork()
        if child == 0:
            train(model, make_config(**settings), rows[:n_rows])
            os._exit(0)
        # Later and later, so that the run gets through on a slow machine too.
        time.sleep(moments.uniform(0.0, 0.3 * (1 + attempt)))
        os.kill(child, signal.SIGKILL)
        if os.WIFEXITED(os.waitpid(child, 0)[1]):
            break
        killed += 1
    assert killed > 1
    assert equal(weights(tmp_path / "killed"), expected)


# ---- signals, a full disk, a vanished dataset ------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_stops_and_the_run_goes_on_bit_for_bit(
    model: VisionLanguageModel,
    make_config: Any,
    rows: Rows,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    number: signal.Signals,
) -> None:
    expected = uninterrupted("prefetch", model, make_config, rows, tmp_path / "whole")
    settings, n_rows = settings_of("prefetch", tmp_path / "stopped", n_checkpoints=0)
    step = MultimodalSAETrainer.step

    def signalling(self: MultimodalSAETrainer, batch: torch.Tensor) -> Any:
        if self.n_training_steps == 4:
            os.kill(os.getpid(), number)
        return step(self, batch)

    with (
        monkeypatch.context() as patched,
        pytest.raises(KeyboardInterrupt, match=r"after 320 tokens; the same command"),
    ):
        patched.setattr(MultimodalSAETrainer, "step", signalling)
        train(model, make_config(**settings), rows[:n_rows])
    last = latest_checkpoint(make_config(**settings).checkpoint_path)
    assert last is not None
    assert last.name == "320"
    train(model, make_config(**settings), rows[:n_rows])
    assert equal(weights(tmp_path / "stopped"), expected)


def test_a_second_signal_stops_at_once_and_saves_no_half_step(
    model: VisionLanguageModel, make_config: Any, rows: Rows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, n_rows = settings_of("topk", tmp_path)
    step = MultimodalSAETrainer.step

    def impatient(self: MultimodalSAETrainer, batch: torch.Tensor) -> Any:
        if self.n_training_steps == 5:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
        return step(self, batch)

    monkeypatch.setattr(MultimodalSAETrainer, "step", impatient)
    config = make_config(**settings)
    with pytest.raises(KeyboardInterrupt, match=rf"goes on from {config.checkpoint_path}/256"):
        train(model, config, rows[:n_rows])
    assert {child.name for child in Path(config.checkpoint_path).iterdir()} == {"256"}


def test_a_full_disk_is_one_clear_line_and_the_last_checkpoint_stays_whole(
    model: VisionLanguageModel, make_config: Any, rows: Rows, tmp_path: Path
) -> None:
    expected = uninterrupted("topk", model, make_config, rows, tmp_path / "whole")
    settings, n_rows = settings_of("topk", tmp_path / "full")
    config = make_config(**settings)
    said = tmp_path / "said"

    def start() -> None:
        put = checkpoint._put_in_place

        def then_fill(staged: Path, folder: Path) -> None:
            put(staged, folder)
            # From now on no file may grow beyond 20 000 bytes, as on a disk that is all but full.
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

        checkpoint._put_in_place = then_fill
        with pytest.raises(StoreError) as caught:
            train(model, config, rows[:n_rows])
        said.write_text(str(caught.value))

    assert in_a_process(start) == 0
    line = said.read_text()
    folder = Path(config.checkpoint_path)
    assert line.startswith(f"The checkpoint {folder}/448 cannot be written (")
    assert "File too large" in line
    assert line.endswith(f"Stopped after 448 tokens; the same command goes on from {folder}/256.")
    assert "\n" not in line
    assert {child.name for child in folder.iterdir()} == {"256"}
    train(model, make_config(**settings), rows[:n_rows])
    assert equal(weights(tmp_path / "full"), expected)


def test_a_full_disk_while_the_sae_is_saved(
    model: VisionLanguageModel, make_config: Any, rows: Rows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    settings, n_rows = settings_of("topk", tmp_path, n_checkpoints=0)
    monkeypatch.setattr(output, "write_json", full)
    with pytest.raises(StoreError, match=r"The SAE cannot be saved in .*No space left on device"):
        train(model, make_config(**settings), rows[:n_rows])


def test_a_vanished_dataset_is_one_clear_line_and_the_last_checkpoint_stays_whole(
    model: VisionLanguageModel, make_config: Any, text_rows: Rows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "rows.jsonl"
    lines = "".join(json.dumps({"messages": row["messages"]}) + "\n" for row in text_rows)
    file.write_text(lines)
    changes = {"dataset_path": str(file), "token_shares": {"text": 1.0}, "n_eval_batches": 0}
    settings, _ = settings_of("topk", tmp_path / "gone", **changes)
    whole, _ = settings_of("topk", tmp_path / "whole", **changes, resume_from_checkpoint=None)

    def start(**given: Any) -> None:
        MultimodalSAETrainingRunner(make_config(**given), override_model=model).run()

    start(**whole)
    save = MultimodalSAETrainer.save_checkpoint

    def then_remove(self: MultimodalSAETrainer, *given: Any, **named: Any) -> None:
        save(self, *given, **named)
        file.unlink(missing_ok=True)

    folder = make_config(**settings).checkpoint_path
    with monkeypatch.context() as patched:
        patched.setattr(MultimodalSAETrainer, "save_checkpoint", then_remove)
        with pytest.raises(DatasetError) as caught:
            start(**settings)
    line = str(caught.value)
    assert line.startswith("The dataset cannot be read beyond row ")
    assert "rows.jsonl" in line
    assert line.endswith(f"; the same command goes on from {folder}/256.")
    assert "\n" not in line
    file.write_text(lines)
    start(**settings)
    assert equal(weights(tmp_path / "gone"), weights(tmp_path / "whole"))


# ---- seeds -----------------------------------------------------------------------------------------------------------


def test_the_seed_seeds_every_library_and_leaves_them_as_they_were() -> None:
    def draw() -> tuple[float, float, float]:
        return torch.rand(1).item(), float(np.random.rand()), random.random()

    np.random.seed(5)
    random.seed(5)
    torch.manual_seed(5)
    expected = draw()
    np.random.seed(5)
    random.seed(5)
    torch.manual_seed(5)
    drawn = []
    for seed in (1, 1, 2):
        with seeded(seed):
            drawn.append(draw())
    assert drawn[0] == drawn[1]
    assert not set(drawn[0]) & set(drawn[2])
    assert draw() == expected


def test_the_random_state_goes_on_in_every_library(tmp_path: Path) -> None:
    with seeded(3):
        torch.randn(3)
        np.random.standard_normal()  # leaves a second value behind in numpy's generator
        random.gauss(0, 1)
        save_tree(tmp_path / "random.safetensors", random_state())
        expected = torch.randn(3).tolist(), np.random.standard_normal(3).tolist(), random.gauss(0, 1)
    with seeded(4):
        restore_random_state(load_tree(tmp_path / "random.safetensors"))
        assert (torch.randn(3).tolist(), np.random.standard_normal(3).tolist(), random.gauss(0, 1)) == expected


def test_a_tree_is_read_as_it_was_written(tmp_path: Path) -> None:
    shared = torch.arange(6.0).reshape(2, 3)
    tree = {
        "numbers": [1, 0.1 + 0.2, float("inf"), -float("inf"), True, None, 2**70],
        "by number": {0: {"step": torch.tensor(3.0)}, 1: "one"},
        "tuple": (1, ("a", [shared])),
        "views": [shared.T, shared[:, 1], shared],
        "kinds": [torch.tensor([1], dtype=torch.int8), torch.tensor(0.5, dtype=torch.bfloat16), torch.zeros(0, 4)],
        "empty": {},
    }
    save_tree(tmp_path / "tree.safetensors", tree)
    again = load_tree(tmp_path / "tree.safetensors")
    assert again["numbers"] == tree["numbers"]
    assert again["by number"] == tree["by number"]
    assert again["empty"] == {}
    torch.testing.assert_close(again["tuple"][1][1], [shared], rtol=0, atol=0)
    torch.testing.assert_close(again["views"], tree["views"], rtol=0, atol=0)
    assert isinstance(again["tuple"][1], tuple)
    assert [tensor.dtype for tensor in again["kinds"]] == [torch.int8, torch.bfloat16, torch.float32]
    with pytest.raises(TypeError, match="holds set"):
        save_tree(tmp_path / "other.safetensors", {"names": {1, 2}})
    with pytest.raises(StoreError, match="cannot be read"):
        load_tree(tmp_path / "nothing.safetensors")
