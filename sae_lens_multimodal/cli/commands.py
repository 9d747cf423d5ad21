"""What each command does: turn its options into the arguments of one public function."""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sae_lens_multimodal.cli.options import parse_changes, parse_features
from sae_lens_multimodal.errors import ConfigError, StoreError

if TYPE_CHECKING:
    from sae_lens_multimodal.adapters.model import VisionLanguageModel
    from sae_lens_multimodal.autointerp.judges.base import Judge
    from sae_lens_multimodal.autointerp.prompts import PromptBook

EXPLANATIONS_FOLDER = "explanations"
SCORES_FOLDER = "scores"
ANSWERS_FILE = "answers.sqlite"


def demo(options: Namespace) -> None:
    """Run the whole story on the embedded model."""
    from sae_lens_multimodal.demo.run import run_demo
    from sae_lens_multimodal.demo.tables import metric_lines

    metrics = run_demo(options.output, seed=options.seed, say=_say)
    _print("", *metric_lines(metrics), "", f"report: {(options.output / 'report' / 'index.html').resolve()}")


def train(options: Namespace) -> None:
    """Train a sparse autoencoder."""
    from sae_lens_multimodal.training.config_file import load_config
    from sae_lens_multimodal.training.runner import MultimodalSAETrainingRunner

    config = load_config(options.config, options.overrides)
    MultimodalSAETrainingRunner(config).run()
    if config.output_path is not None:
        _print(str(Path(config.output_path).resolve()))


def harvest(options: Namespace) -> None:
    """Find the examples and statistics of every feature."""
    from sae_lens_multimodal.features.harvest import harvest as run

    model, sae = _model_and_sae(options)
    store = run(
        model,
        sae,
        options.dataset,
        options.output,
        hook_name=options.hook,
        n_top=options.n_top,
        rank=options.rank,
        batch_size=options.batch_size,
        max_prompts=options.max_prompts,
        split=options.split,
        keep_images=options.keep_images,
        seed=options.seed,
    )
    _print(f"{len(store.features)} of {store.d_sae} features fired; their examples are in {store.folder.resolve()}")


def explain(options: Namespace) -> None:
    """Have a VLM explain features."""
    from sae_lens_multimodal.autointerp.explain import explain as run
    from sae_lens_multimodal.features.store import FeatureStore

    store = FeatureStore.open(options.store)
    output = options.output or options.store / EXPLANATIONS_FOLDER
    explanations = run(
        store,
        _judge(options),
        output=output,
        features=parse_features(options.features),
        prompts=_prompts(options),
        seed=options.seed,
    )
    failures = [explanation.failure for explanation in explanations if explanation.failure is not None]
    _print(f"{len(explanations) - len(failures)} features answered, {len(failures)} failed: {output.resolve()}")
    if failures:
        _say(f"first failure: {failures[0].message}")


def score(options: Namespace) -> None:
    """Have a judge score explanations."""
    from sae_lens_multimodal.autointerp.explanation import read_explanations
    from sae_lens_multimodal.autointerp.score import score as run
    from sae_lens_multimodal.features.store import FeatureStore

    store = FeatureStore.open(options.store)
    output = options.output or options.store / SCORES_FOLDER
    run(
        store,
        _judge(options),
        read_explanations(options.explanations or options.store / EXPLANATIONS_FOLDER),
        output=output,
        prompts=_prompts(options),
        seed=options.seed,
    )
    _print(str(output.resolve()))


def report(options: Namespace) -> None:
    """Make a report from what a store's folder holds."""
    from sae_lens_multimodal.autointerp.explanation import read_explanations
    from sae_lens_multimodal.autointerp.results import read_scores, read_verdicts
    from sae_lens_multimodal.features.store import FeatureStore
    from sae_lens_multimodal.report.build import build_report

    explanations = options.explanations or options.store / EXPLANATIONS_FOLDER
    scores = options.scores or options.store / SCORES_FOLDER
    index = build_report(
        FeatureStore.open(options.store),
        output=options.output,
        explanations=read_explanations(explanations) if explanations.exists() else None,
        scores=read_scores(scores) if scores.is_dir() else None,
        verdicts=read_verdicts(scores) if scores.is_dir() else None,
        title=options.title or options.store.name,
    )
    _print(str(index))


def steer(options: Namespace) -> None:
    """Ask a question of the model as it is and of the steered model."""
    from sae_lens_multimodal.hooks.steer import steer as run

    changes = parse_changes(options)
    model, sae = _model_and_sae(options)
    pictures = [{"type": "image", "image": str(path)} for path in options.image]
    question = [{"role": "user", "content": [*pictures, {"type": "text", "text": options.prompt}]}]
    steered = run(
        model, sae, changes, tokens=options.tokens, steps=options.steps, hook_name=options.hook, error=options.error
    )
    before = model.answer([question], max_new_tokens=options.max_new_tokens)[0]
    after = steered.answer([question], max_new_tokens=options.max_new_tokens)[0]
    _print(f"before: {before}", f"after:  {after}")


COMMANDS: dict[str, Callable[[Namespace], None]] = {
    "demo": demo,
    "train": train,
    "harvest": harvest,
    "explain": explain,
    "score": score,
    "report": report,
    "steer": steer,
}


def _model_and_sae(options: Namespace) -> tuple[VisionLanguageModel, Any]:
    from sae_lens import SAE
    from safetensors import SafetensorError

    from sae_lens_multimodal.adapters.model import load_model

    if not options.sae.is_dir():
        raise StoreError(f"{options.sae} is not a folder; expected one that SAE-Lens saved (cfg.json and weights).")
    model = load_model(options.model, device=options.device, dtype=options.dtype)
    try:
        return model, SAE.load_from_disk(options.sae, device=options.device)
    except (OSError, KeyError, ValueError, TypeError, RuntimeError, SafetensorError) as error:
        raise StoreError(f"{options.sae} cannot be read as a SAE that SAE-Lens saved: {error}") from error


def _judge(options: Namespace) -> Judge:
    from sae_lens_multimodal.autointerp.judges import CachedJudge, OpenAIJudge, TransformersJudge

    if options.base_url is not None:
        judge: Judge = OpenAIJudge(options.judge, base_url=options.base_url, api_key_variable=options.api_key_env)
    else:
        judge = TransformersJudge(options.judge, device=options.device)
    return CachedJudge(judge, options.store / ANSWERS_FILE)


def _prompts(options: Namespace) -> PromptBook | None:
    if options.dialect == "general":
        return None
    if options.dialect == "scenes":
        from sae_lens_multimodal.scenes.prompt_book import scenes_prompt_book

        return scenes_prompt_book()
    raise ConfigError(f"dialect is {options.dialect!r}; expected 'general' or 'scenes'.")


def _print(*lines: str) -> None:
    sys.stdout.write("\n".join(lines) + "\n")


def _say(line: str) -> None:
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()
