"""What each command does: turn its options into the arguments of one public function."""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sae_lens_multimodal.cli.autointerp import calibrate, explain, score
from sae_lens_multimodal.cli.concepts import concepts
from sae_lens_multimodal.cli.editing import edit
from sae_lens_multimodal.cli.measuring import measure
from sae_lens_multimodal.cli.options import parse_changes
from sae_lens_multimodal.cli.reporting import export, report
from sae_lens_multimodal.cli.tracing import trace
from sae_lens_multimodal.errors import ConfigError, StoreError

if TYPE_CHECKING:
    from sae_lens import SAE

    from sae_lens_multimodal.adapters.model import VisionLanguageModel
    from sae_lens_multimodal.data.mixture import Mixture


def demo(options: Namespace) -> None:
    """Run the whole story on the embedded model."""
    from sae_lens_multimodal.demo.run import run_demo
    from sae_lens_multimodal.demo.tables import metric_lines

    metrics = run_demo(options.output, seed=options.seed, say=_say)
    _print("", *metric_lines(metrics), "", f"report: {(options.output / 'report' / 'index.html').resolve()}")


def train(options: Namespace) -> None:
    """Train a sparse autoencoder, or several."""
    from sae_lens_multimodal.training.runner import MultimodalSAETrainingRunner
    from sae_lens_multimodal.training.several import MultimodalMultiSAETrainingRunner
    from sae_lens_multimodal.training.several_config import MultimodalMultiSAERunnerConfig, load_run_config

    config = load_run_config(options.config, options.overrides)
    runner: MultimodalMultiSAETrainingRunner | MultimodalSAETrainingRunner
    if isinstance(config, MultimodalMultiSAERunnerConfig):
        runner = MultimodalMultiSAETrainingRunner(config)
    else:
        runner = MultimodalSAETrainingRunner(config)
    runner.run()
    if runner.cfg.output_path is not None:
        _print(str(Path(runner.cfg.output_path).resolve()))


def cache(options: Namespace) -> None:
    """Write the activations of a training run, to train from many times."""
    from sae_lens_multimodal.training.cache import cache_activations
    from sae_lens_multimodal.training.config_file import load_config

    _print(str(cache_activations(load_config(options.config, options.overrides), say=_say).resolve()))


def evaluate(options: Namespace) -> None:
    """Measure an SAE and floors beside it."""
    from sae_lens_multimodal.training.evaluation import evaluate as run
    from sae_lens_multimodal.training.evaluation_report import evaluation_lines, save_evaluation
    from sae_lens_multimodal.training.trained_on import TrainingRun

    known = TrainingRun.of(options.sae, device=options.device)
    model = known.load_model(options.model, device=options.device, dtype=options.dtype)
    found = run(
        known,
        options.dataset,
        model=model,
        hook_name=options.hook,
        split=options.split,
        subset=options.subset,
        image_folder=options.image_folder,
        max_prompts=options.max_prompts,
        loss_prompts=options.loss_prompts,
        floors=options.floors,
        batch_size=options.batch_size,
        context_size=options.context_size,
        seed=options.seed,
    )
    _print(*evaluation_lines(found))
    if options.output is not None:
        save_evaluation(found, options.output)
    if options.scenes:
        _print("", *_truth_lines(model, found.saes, options))


def _truth_lines(model: VisionLanguageModel, saes: dict[str, Any], options: Namespace) -> list[str]:
    from sae_lens_multimodal.files import write_json
    from sae_lens_multimodal.scenes.rows import scene_rows
    from sae_lens_multimodal.scenes.truth import fit_several
    from sae_lens_multimodal.scenes.truth_tables import concept_lines, summary_lines, truth_record
    from sae_lens_multimodal.types import Modality

    rows = scene_rows(options.seed + 7_000, options.scenes, kinds=("scene", "text"))
    truths = fit_several(model, saes, rows, hook_name=options.hook, batch_size=options.batch_size)
    if options.output is not None:
        write_json(options.output / "truth.json", {name: truth_record(truth) for name, truth in truths.items()})
    kinds = ("colour", "shape", "texture", "glyph", "background", "border")
    return [*summary_lines(truths), "", *concept_lines(truths["sae"], Modality.IMAGE, kinds=kinds)]


def harvest(options: Namespace) -> None:
    """Find the examples and statistics of every feature."""
    from sae_lens_multimodal.features.describe import describe_features
    from sae_lens_multimodal.features.harvest import harvest as run
    from sae_lens_multimodal.features.near import NEAR_BITS

    model, sae = _model_and_sae(options)
    store = run(
        model,
        sae,
        options.dataset if options.mixture is None else _mixture(options),
        options.output,
        hook_name=options.hook,
        n_top=options.n_top,
        rank=options.rank,
        batch_size=options.batch_size,
        max_prompts=options.max_prompts,
        split=options.split,
        keep_images=options.keep_images,
        near_bits=None if options.exact_pictures else NEAR_BITS,
        seed=options.seed,
        n_workers=options.workers,
    )
    if options.describe:
        describe_features(model, sae, store)
    _print(f"{len(store.features)} of {store.d_sae} features fired; their examples are in {store.folder.resolve()}")


def _mixture(options: Namespace) -> Mixture:
    """Open the datasets that a YAML file names: a list of entries, or `dataset_mixture` in a training config."""
    import yaml

    from sae_lens_multimodal.data.mixture import open_mixture

    try:
        found = yaml.safe_load(options.mixture.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{options.mixture} cannot be read as YAML: {' '.join(str(error).split())}") from error
    entries = found.get("dataset_mixture") if isinstance(found, dict) else found
    if not isinstance(entries, list):
        raise ConfigError(f"{options.mixture} holds no list; expected entries with path and weight.")
    stop: Any = found.get("mixture_stop", "all_exhausted") if isinstance(found, dict) else "all_exhausted"
    return open_mixture(entries, seed=options.seed, stop=stop, split=options.split)


def steer(options: Namespace) -> None:
    """Ask a question of the model as it is and of the steered model, or measure a dose curve."""
    from sae_lens_multimodal.cli.steering import check_steer_flags, describe, place_of, side_by_side
    from sae_lens_multimodal.hooks.steer import steer as run

    _take_positional(options)
    check_steer_flags(options)
    changes = {} if options.target is not None else parse_changes(options)
    settings = {"tokens": place_of(options), "steps": options.steps, "hook_name": options.hook, "error": options.error}
    model, sae = _model_and_sae(options)
    pictures = [{"type": "image", "image": str(path)} for path in options.image]
    question = [{"role": "user", "content": [*pictures, {"type": "text", "text": options.prompt}]}]
    if options.target is not None:
        _dose(options, model, sae, question, settings)
        return
    steered = run(model, sae, changes, **settings)
    before = model.answer([question], max_new_tokens=options.max_new_tokens)[0]
    after = steered.answer([question], max_new_tokens=options.max_new_tokens)[0]
    _print(*side_by_side(before, after, describe(changes)))


def _dose(
    options: Namespace, model: VisionLanguageModel, sae: SAE[Any], question: list[Any], settings: dict[str, Any]
) -> None:
    from sae_lens_multimodal.cli.steering import dose_lines, parse_numbers
    from sae_lens_multimodal.features.store import FeatureStore
    from sae_lens_multimodal.hooks.dose import STRENGTHS, dose_response
    from sae_lens_multimodal.report.dose import build_dose_report

    if options.feature is None:
        raise ConfigError("--target needs --feature, the feature whose strengths are tried.")
    curve = dose_response(
        model,
        sae,
        options.feature,
        [question],
        options.target,
        strengths=STRENGTHS if options.dose is None else parse_numbers("dose", options.dose),
        unit=options.unit if options.store is None else FeatureStore.open(options.store),
        modality=options.modality,
        **settings,
    )
    _print(*dose_lines(curve))
    if options.output is not None:
        _print(str(build_dose_report([curve], output=options.output)))


def _take_positional(options: Namespace) -> None:
    """Let MODEL and SAE stand for --model and --sae."""
    options.model, options.sae = options.model or options.model_at, options.sae or options.sae_at
    if options.model is None or options.sae is None:
        raise ConfigError("no model or no SAE was given; expected steer MODEL SAE ..., or --model and --sae.")


def attribute(options: Namespace) -> None:
    """Say which features an answer rests on."""
    from sae_lens_multimodal.cli.attribution import attribution_lines
    from sae_lens_multimodal.files import write_json
    from sae_lens_multimodal.hooks.attribute import attribute as run
    from sae_lens_multimodal.hooks.attribution_check import check_attribution
    from sae_lens_multimodal.hooks.metrics import ContinuationLogProbability, LogitDifference, Metric

    wanted, unwanted = options.wanted, options.unwanted
    metric: Metric = ContinuationLogProbability(wanted) if unwanted is None else LogitDifference(wanted, unwanted)
    model, sae = _model_and_sae(options)
    pictures = [{"type": "image", "image": str(path)} for path in options.image]
    question = [{"role": "user", "content": [*pictures, {"type": "text", "text": options.prompt}]}]
    found = run(
        model,
        sae,
        question,
        metric,
        hook_name=options.hook,
        tokens=options.tokens,
        method=options.method,
        n_steps=options.n_steps,
    )
    check = check_attribution(model, sae, found, n=options.check, progress=True) if options.check else None
    _print(*attribution_lines(found, check, options.top))
    if options.output is not None:
        write_json(options.output, {**found.to_dict(), "check": None if check is None else check.to_dict()})


COMMANDS: dict[str, Callable[[Namespace], None]] = {
    "demo": demo,
    "train": train,
    "cache": cache,
    "evaluate": evaluate,
    "harvest": harvest,
    "explain": explain,
    "score": score,
    "measure": measure,
    "calibrate": calibrate,
    "report": report,
    "export": export,
    "steer": steer,
    "attribute": attribute,
    "trace": trace,
    "concepts": concepts,
    "edit": edit,
}


def _model_and_sae(options: Namespace) -> tuple[VisionLanguageModel, Any]:
    from sae_lens_multimodal.adapters.model import load_model
    from sae_lens_multimodal.hooks.load_sae import load_sae

    if not options.sae.is_dir():
        raise StoreError(f"{options.sae} is not a folder; expected one that SAE-Lens saved (cfg.json and weights).")
    model = load_model(options.model, device=options.device, dtype=options.dtype)
    return model, load_sae(options.sae, options.device or "cpu")


def _print(*lines: str) -> None:
    sys.stdout.write("\n".join(lines) + "\n")


def _say(line: str) -> None:
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()
