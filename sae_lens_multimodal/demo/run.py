"""The demo from end to end, one function a step."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from sae_lens import SAE, TopKTrainingSAEConfig

from sae_lens_multimodal.adapters.model import VisionLanguageModel, load_model
from sae_lens_multimodal.autointerp.explain import explain
from sae_lens_multimodal.autointerp.explanation import Explanation
from sae_lens_multimodal.autointerp.judges import CachedJudge, Judge, TransformersJudge
from sae_lens_multimodal.autointerp.results import Score, read_verdicts, summarise
from sae_lens_multimodal.autointerp.score import score
from sae_lens_multimodal.data.batches import encoded_batches
from sae_lens_multimodal.data.stream import read_prompts
from sae_lens_multimodal.demo.naming import naming_shares
from sae_lens_multimodal.demo.settings import DemoSettings
from sae_lens_multimodal.demo.steering import SteeringResult, steer_features
from sae_lens_multimodal.demo.tables import report_tables
from sae_lens_multimodal.errors import StoreError
from sae_lens_multimodal.features.describe import DescriptionSettings, describe_features
from sae_lens_multimodal.features.harvest import harvest
from sae_lens_multimodal.features.store import FeatureStore
from sae_lens_multimodal.files import MANIFEST_NAME, read_manifest, write_json, write_manifest
from sae_lens_multimodal.hooks.effects import top_output_tokens
from sae_lens_multimodal.report.build import build_report
from sae_lens_multimodal.report.records import OutputToken
from sae_lens_multimodal.scenes.cross_modal import cross_modal_truth
from sae_lens_multimodal.scenes.folder import model_folder
from sae_lens_multimodal.scenes.prompt_book import scenes_prompt_book
from sae_lens_multimodal.scenes.rows import scene_rows, scenes_dataset
from sae_lens_multimodal.scenes.truth import Truth, fit_several
from sae_lens_multimodal.scenes.truth_tables import truth_summary
from sae_lens_multimodal.training.config import MultimodalSAERunnerConfig
from sae_lens_multimodal.training.evaluate import evaluate_reconstruction
from sae_lens_multimodal.training.floors import TokenMoments, build_floors
from sae_lens_multimodal.training.runner import MultimodalSAETrainingRunner
from sae_lens_multimodal.training.tokens import TokenChoice, read_tokens

DEMO_KIND, SCHEMA_VERSION = "demo", 1
TRAINING_ROWS = 1_000_000
"""More rows than any run uses: the stream never begins again."""
TRAINING_KINDS = ("scene", "text", "text", "scene", "text", "text", "interleaved", "text", "text")
"""A picture has ten times as many tokens as the words about it; rows of text alone even that out."""

Say = Callable[[str], None]


def run_demo(
    output: Path, *, seed: int = 0, settings: DemoSettings | None = None, say: Say = lambda _: None
) -> dict[str, Any]:
    """Train, harvest, explain, score and steer on the embedded model, and write a report.

    Args:
        output: folder to write; one of an earlier demo is replaced.
        seed: of everything random; ignored where settings are given.
        settings: how much of everything.
        say: told what happens, line by line.

    Returns:
        The numbers that `metrics.json` holds.

    Raises:
        StoreError: the folder holds something else than an earlier demo.
    """
    settings = settings or DemoSettings(seed=seed)
    _prepare(output, settings)
    seconds: dict[str, float] = {}
    with _step("1/7 training a sparse autoencoder on image and text tokens", seconds, "train", say):
        model = load_model(model_folder())
        sae = train_sae(model, settings, output / "sae")
    with _step("2/7 measuring its reconstruction on unseen scenes", seconds, "evaluate", say):
        reconstruction = _evaluate(model, sae, settings)
    with _step("3/7 harvesting what every feature responds to, and describing it", seconds, "harvest", say):
        store = _harvest(model, sae, settings, output / "features")
    with _step("4/7 comparing the features with the scenes' masks and words", seconds, "truth", say):
        truths = _fit(model, sae, settings)
        truth = truths["sae"].only_attributes()
    with _step("5/7 explaining features and scoring the explanations", seconds, "autointerp", say):
        judge = CachedJudge(TransformersJudge(model, batch_size=settings.batch_size), output / "answers.sqlite")
        explanations = _explain(store, judge, settings, output / "explanations")
        scores = _score(store, judge, explanations, settings, output / "scores")
    with _step("6/7 steering with features", seconds, "steer", say):
        steering = steer_features(model, sae, store, truth, n_scenes=settings.steered_scenes, seed=settings.seed)
    metrics: dict[str, Any] = {
        "reconstruction": reconstruction,
        "truth": _truth_metrics(truths),
        "naming": naming_shares(truth, explanations),
        "scores": [one.to_json() for one in summarise(scores, seed=settings.seed)],
        "steering": steering.to_json(),
    }
    with _step("7/7 writing the report", seconds, "report", say):
        _report(model, sae, store, explanations, scores, steering, metrics, output, judge.id)
    metrics["seconds"] = {name: round(value, 1) for name, value in seconds.items()}
    write_json(output / "metrics.json", metrics)
    return metrics


def _prepare(output: Path, settings: DemoSettings) -> None:
    """Make the folder; an earlier demo in it goes, anything else stays and is an error."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        if not (output / MANIFEST_NAME).is_file():
            raise StoreError(f"{output} exists and holds no demo; give another folder with --output, or empty it.")
        read_manifest(output, kind=DEMO_KIND, schema_version=SCHEMA_VERSION)
        shutil.rmtree(output)
    output.mkdir(parents=True, exist_ok=True)
    write_manifest(output, kind=DEMO_KIND, schema_version=SCHEMA_VERSION, settings=asdict(settings))


@contextmanager
def _step(title: str, seconds: dict[str, float], name: str, say: Say) -> Iterator[None]:
    say(f"== {title}")
    start = time.perf_counter()
    yield
    seconds[name] = time.perf_counter() - start


def train_sae(model: VisionLanguageModel, settings: DemoSettings, output: Path) -> SAE[Any]:
    """Train as a user would: a SAE-Lens config, its runner, and SAE-Lens's own loader."""
    config: MultimodalSAERunnerConfig[TopKTrainingSAEConfig] = MultimodalSAERunnerConfig(
        sae=TopKTrainingSAEConfig(d_in=model.d_model, d_sae=settings.d_sae, k=settings.k),
        model_name=str(model.name),
        hook_name=settings.hook_name,
        dataset_path="sae_lens_multimodal.scenes",
        token_shares={"image": settings.image_share, "text": 1 - settings.image_share},
        training_tokens=settings.training_tokens,
        train_batch_size_tokens=2048,
        store_batch_size_prompts=settings.batch_size,
        n_batches_in_buffer=16,
        lr=3e-3,
        dead_feature_window=20,
        lr_warm_up_steps=20,
        lr_decay_steps=settings.training_tokens // 2048 // 3,
        n_eval_batches=0,
        checkpoint_path=None,
        output_path=str(output),
        seed=settings.seed,
    )
    dataset = scenes_dataset(_data_seed(settings, 1), TRAINING_ROWS, kinds=TRAINING_KINDS)
    MultimodalSAETrainingRunner(config, override_dataset=dataset, override_model=model).run()
    return SAE.load_from_disk(output)


def _data_seed(settings: DemoSettings, step: int) -> int:
    """Give every step scenes of its own."""
    return 1_000 + 10 * settings.seed + step


def _evaluate(model: VisionLanguageModel, sae: SAE[Any], settings: DemoSettings) -> dict[str, Any]:
    rows = scene_rows(_data_seed(settings, 2), settings.evaluation_prompts)
    return evaluate_reconstruction(
        model, sae, read_prompts(list(rows)), hook_name=settings.hook_name, batch_size=settings.batch_size
    )


def _harvest(model: VisionLanguageModel, sae: SAE[Any], settings: DemoSettings, output: Path) -> FeatureStore:
    store = harvest(
        model,
        sae,
        scenes_dataset(_data_seed(settings, 3), settings.harvest_prompts, kinds=("scene", "scene", "text")),
        output,
        n_top=12,
        n_ordinary=12,
        n_silent=12,
        batch_size=settings.batch_size,
        seed=settings.seed,
    )
    return describe_features(model, sae, store, settings=DescriptionSettings(n_examples=2))


def _fit(model: VisionLanguageModel, sae: SAE[Any], settings: DemoSettings) -> dict[str, Truth]:
    """Compare the SAE and floors of the same sparsity, which are fitted to scenes of their own, with the truth."""
    fitting = read_prompts(list(scene_rows(_data_seed(settings, 5), settings.truth_prompts // 3, kinds=TRAINING_KINDS)))
    batches = encoded_batches(model, fitting, batch_size=settings.batch_size)
    read = (read_tokens(model, one.batch, settings.hook_name, TokenChoice()) for one in batches)
    floors = build_floors(sae, TokenMoments.of(read), seed=settings.seed)
    rows = scene_rows(_data_seed(settings, 4), settings.truth_prompts, kinds=("scene", "text"))
    saes = {"sae": sae, **floors}
    return fit_several(model, saes, rows, hook_name=settings.hook_name, batch_size=settings.batch_size)


def _explain(store: FeatureStore, judge: Judge, settings: DemoSettings, output: Path) -> list[Explanation]:
    """Explain a random choice of the features that fire in enough prompts."""
    often = np.flatnonzero(store.statistics["n_prompts"].to_numpy() >= settings.examples_needed)
    candidates = store.statistics["feature"].to_numpy()[often]
    chosen = np.random.default_rng(settings.seed).permutation(candidates)[: settings.explained_features]
    return explain(
        store,
        judge,
        output=output,
        features=sorted(chosen.tolist()),
        prompts=scenes_prompt_book(),
        seed=settings.seed,
    )


def _score(
    store: FeatureStore, judge: Judge, explanations: Sequence[Explanation], settings: DemoSettings, output: Path
) -> list[Score]:
    return score(store, judge, explanations, output=output, prompts=scenes_prompt_book(), seed=settings.seed)


def _truth_metrics(truths: Mapping[str, Truth]) -> dict[str, Any]:
    cross_modal = cross_modal_truth(truths["sae"])
    return {
        **{name: truth_summary(truth) for name, truth in truths.items()},
        "cross_modal": [str(concept) for _, concept in cross_modal.found],
    }


def _report(
    model: VisionLanguageModel,
    sae: SAE[Any],
    store: FeatureStore,
    explanations: Sequence[Explanation],
    scores: Sequence[Score],
    steering: SteeringResult,
    metrics: dict[str, Any],
    output: Path,
    judge_id: str,
) -> None:
    explained = {one.feature for one in explanations}
    shown = sorted(explained | set(steering.records))
    tokens = zip(shown, top_output_tokens(model, sae, shown, k=8), strict=True)
    build_report(
        store,
        output=output / "report",
        explanations=explanations,
        scores=scores,
        verdicts=read_verdicts(output / "scores"),
        steering=steering.records,
        output_tokens={
            feature: [OutputToken(token=token, logit=logit) for token, logit in found] for feature, found in tokens
        },
        judge=judge_id,
        prompts=scenes_prompt_book(),
        summary=report_tables(metrics),
        title="SAE features of a tiny LLaVA-NeXT",
        features=shown,
    )
