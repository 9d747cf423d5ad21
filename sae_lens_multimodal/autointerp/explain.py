"""Asking a vision-language model what each feature stands for, from regions or marked text."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tqdm import tqdm

from sae_lens_multimodal.autointerp.costs import ledger_kept
from sae_lens_multimodal.autointerp.explainers.base import Context, Procedure
from sae_lens_multimodal.autointerp.explainers.general import General
from sae_lens_multimodal.autointerp.explanation import (
    EXPLANATIONS,
    KIND,
    SCHEMA_VERSION,
    Explanation,
    ModalityName,
)
from sae_lens_multimodal.autointerp.general_prompts import GeneralPrompts
from sae_lens_multimodal.autointerp.judges.base import TRANSIENT, Judge
from sae_lens_multimodal.autointerp.prompts import PromptBook
from sae_lens_multimodal.autointerp.records import RecordFolder
from sae_lens_multimodal.autointerp.selection import choose_modality
from sae_lens_multimodal.errors import ConfigError

if TYPE_CHECKING:
    from sae_lens_multimodal.features.store import FeatureStore

logger = logging.getLogger(__name__)

FEATURES_AT_ONCE = 64
"""Requests of so many features are made, held in memory and asked together."""


def explain(
    store: FeatureStore,
    judge: Judge,
    *,
    output: Path | str,
    features: Sequence[int] | None = None,
    prompts: PromptBook | None = None,
    modality: Literal["auto", "image", "text", "both"] = "auto",
    procedure: Procedure | None = None,
    n_examples: int = 5,
    n_contrast: int = 3,
    threshold: float = 0.5,
    context: int = 12,
    seed: int = 0,
    retry_failed: bool = False,
    progress: bool = True,
) -> list[Explanation]:
    """Ask a judge what features stand for.

    Explanations are added to `explanations.jsonl` as they come; running again goes on where it stopped. `ledger.json`
    says what all runs together cost: requests asked and answered from the cache, tokens, seconds, failures.

    Args:
        store: the features and their examples.
        judge: the explainer.
        output: folder of the explanations.
        features: which; None: all that ever fire.
        prompts: the phrases; None: those for models that follow instructions.
        modality: from regions of pictures, from text, from both (two explanations), or from the modality in which
            the feature fires more.
        procedure: `Contrastive()` weighs several explanations on examples of their own, `WordsFirst()` asks only where
            no word at hand tells the meaning, `Joint()` shows picture and text together, `Published()` does as arXiv
            2411.14982 does; None: `General()`, one question about the strongest examples.
        n_examples: how many examples the explainer sees, at most half of those in the store.
        n_contrast: how many silent regions or texts it sees beside them.
        threshold: share of an example's strongest activation from which on a token belongs to a region or is marked.
        context: tokens of text shown on either side.
        seed: of the choice of silent regions and texts.
        retry_failed: ask again where the judge gave no answer the last time (server error, timeout, empty reply).
        progress: show a bar on stderr.

    Returns:
        One explanation for each feature and modality asked for, in that order; features without an example in the
        modality are left out.

    Raises:
        FeatureError: the store does not hold a feature.
        JudgeError: the judge cannot be asked at all; what was answered so far is kept.
        StoreError: the folder holds explanations made with other settings.
    """
    if n_examples < 1 or n_contrast < 0 or context < 0:
        raise ConfigError(f"n_examples={n_examples}, n_contrast={n_contrast}, context={context}; expected >= 1, 0, 0.")
    book = GeneralPrompts() if prompts is None else prompts
    settings: dict[str, Any] = {
        "judge": judge.cache_name,
        "prompts": book.version,
        "n_examples": n_examples,
        "n_contrast": n_contrast,
        "threshold": threshold,
        "context": context,
        "seed": seed,
        "store": store_name(store),
    }
    procedure = procedure or General()
    if procedure.name != General.name:
        settings["procedure"] = procedure.settings()
        # hard negatives come from the descriptions
        settings["described"] = store.descriptions is not None
    folder = RecordFolder(output, kind=KIND, schema_version=SCHEMA_VERSION, settings=settings)
    wanted = _wanted(store, store.features if features is None else features, modality)
    known = _known(folder, retry_failed=retry_failed)
    shared = Context(
        store=store,
        book=book,
        judge_id=judge.id,
        n_examples=n_examples,
        n_contrast=n_contrast,
        threshold=threshold,
        context=context,
        seed=seed,
    )
    missing = [key for key in wanted if key not in known]
    bar = tqdm(total=len(missing), desc="explain", unit="feature", disable=not progress)
    with bar, ledger_kept(judge, folder.folder):
        for start in range(0, len(missing), FEATURES_AT_ONCE):
            chunk = missing[start : start + FEATURES_AT_ONCE]
            before = bar.n
            for explanation in procedure.explain(judge, shared, chunk):
                folder.append(EXPLANATIONS, [explanation.to_json()])
                known[explanation.feature, explanation.modality] = explanation
                bar.update()
            bar.update(before + len(chunk) - bar.n)
    return [known[key] for key in wanted if key in known]


def store_name(store: FeatureStore) -> dict[str, Any]:
    """Say which store results belong to, wherever it lies."""
    return {"created": store.manifest["created"], "hook_name": store.hook_name, "d_sae": store.d_sae}


def _wanted(
    store: FeatureStore, features: Sequence[int], modality: Literal["auto", "image", "text", "both"]
) -> list[tuple[int, ModalityName]]:
    """List every feature with the modality to explain it from."""
    if modality not in ("auto", "image", "text", "both"):
        raise ConfigError(f"modality is {modality!r}; expected 'auto', 'image', 'text' or 'both'.")
    wanted: list[tuple[int, ModalityName]] = []
    for feature in dict.fromkeys(features):
        chosen = choose_modality(store, feature)
        if modality == "both":
            wanted += [(feature, "image"), (feature, "text")]
        elif modality != "auto":
            wanted.append((feature, modality))
        elif chosen is not None:
            wanted.append((feature, chosen))
    return wanted


def _known(folder: RecordFolder, *, retry_failed: bool) -> dict[tuple[int, ModalityName], Explanation]:
    """Read what was explained before; without the failures that are to be tried again."""
    found = [Explanation.from_json(record) for record in folder.read(EXPLANATIONS)]
    kept = [one for one in found if not (retry_failed and one.failure and one.failure.kind in TRANSIENT)]
    if len(kept) < len(found):
        folder.replace(EXPLANATIONS, [one.to_json() for one in kept])
    return {(one.feature, one.modality): one for one in kept}
