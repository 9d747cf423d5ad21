"""The whole of it for one word: gather its states, find concepts on some of them, measure them on the rest."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sae_lens_multimodal.concepts.decompose import Method
from sae_lens_multimodal.concepts.dictionary import SPARSITY, ConceptDictionary, find_concepts
from sae_lens_multimodal.concepts.evaluate import ConceptEvaluation, evaluate_concepts
from sae_lens_multimodal.concepts.gather import gather_states
from sae_lens_multimodal.concepts.states import ConceptStates
from sae_lens_multimodal.data.sources import Rows
from sae_lens_multimodal.errors import ConfigError
from sae_lens_multimodal.files import write_json

if TYPE_CHECKING:
    from sae_lens import SAE

    from sae_lens_multimodal.adapters.model import VisionLanguageModel

EVALUATION_NAME = "evaluation.json"


@dataclass(frozen=True, kw_only=True)
class Decomposition:
    """How concepts are found; see `find_concepts`."""

    k: int = 20
    method: Method = "semi_nmf"
    sparsity: float = SPARSITY
    offset: bool = False
    sae: SAE[Any] | None = field(default=None, repr=False)


@dataclass(frozen=True, kw_only=True)
class Measuring:
    """What concepts are measured with, and on how much; see `evaluate_concepts`."""

    held_out: float = 0.2
    """Share of the rows that concepts are measured on; 0 for none."""
    noise: bool = False
    """Whether to measure with noise in the place of the pictures, too, where words are scored at all."""
    clip: str | None = None
    bert: str | None = None
    bert_layer: int | None = None


@dataclass(frozen=True)
class ConceptRun:
    """What there is of a word."""

    states: ConceptStates
    dictionary: ConceptDictionary
    folder: Path
    """Of the dictionary."""
    evaluation: ConceptEvaluation | None
    """None where nothing was held out."""


def run_concepts(
    model: VisionLanguageModel,
    dataset: str | Path | Rows,
    word: str,
    output: str | Path,
    *,
    hook_name: str | None = None,
    decomposition: Decomposition | None = None,
    measuring: Measuring | None = None,
    seed: int = 0,
    **gathering: Any,  # noqa: ANN401 - those of gather_states
) -> ConceptRun:
    """Gather a word's states into `output/states`, save a dictionary as `output/dictionary`, and measure it.

    Args:
        model: The model.
        dataset: Prompts (see `open_dataset`).
        word: A word or phrase.
        output: Folder; states that lie there already are used.
        hook_name: Where; by default the output of the last block.
        decomposition: How concepts are found.
        measuring: How they are measured.
        seed: Of everything random.
        **gathering: Further arguments of `gather_states`.

    Raises:
        ConfigError, DatasetError, StoreError, SAEMismatchError: as `gather_states`, `find_concepts` and
            `evaluate_concepts`.
    """
    how, measuring = decomposition or Decomposition(), measuring or Measuring()
    if not 0 <= measuring.held_out < 1:
        raise ConfigError(f"Got held_out={measuring.held_out}; expected a share from 0 up to, but without, 1.")
    output = Path(output)
    shared: dict[str, Any] = {"hook_name": hook_name, "seed": seed, **gathering}
    states = gather_states(model, dataset, word, output=output / "states", **shared)
    found_on, measured_on = states.split(1 - measuring.held_out, seed=seed)
    dictionary = find_concepts(
        found_on, how.k, how.method, seed=seed, sparsity=how.sparsity, sae=how.sae, offset=how.offset
    )
    folder = dictionary.save(output / "dictionary")
    if not len(measured_on):
        return ConceptRun(states, dictionary, folder, None)
    noise = None
    if measuring.noise and (measuring.clip is not None or measuring.bert is not None):
        # Only the rows that are measured on are read again; which they are follows from seed and share.
        own: dict[str, Any] = {**shared, "pictures": "noise", "only_rows": sorted(set(measured_on.rows))}
        folder_of_noise = output / f"noise-seed{seed}-{measuring.held_out:g}"
        noise = gather_states(model, dataset, word, output=folder_of_noise, **own)
    evaluation = evaluate_concepts(
        model,
        {how.method: dictionary},
        measured_on,
        dataset=dataset,
        noise=noise,
        clip=measuring.clip,
        bert=measuring.bert,
        bert_layer=measuring.bert_layer,
        seed=seed,
        split=gathering.get("split", "train"),
        image_folder=gathering.get("image_folder"),
    )
    names = ("rows", "intervals", "n_states", "skipped")
    write_json(output / EVALUATION_NAME, {name: getattr(evaluation, name) for name in names})
    return ConceptRun(states, dictionary, folder, evaluation)
