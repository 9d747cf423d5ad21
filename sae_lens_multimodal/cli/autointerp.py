"""The commands that ask judges: explain, score and calibrate."""

from __future__ import annotations

import sys
import tempfile
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sae_lens_multimodal.cli.options import parse_features
from sae_lens_multimodal.errors import ConfigError

if TYPE_CHECKING:
    from sae_lens_multimodal.autointerp.explainers.base import Procedure
    from sae_lens_multimodal.autointerp.explainers.contrastive import Contrastive
    from sae_lens_multimodal.autointerp.judges.base import Judge
    from sae_lens_multimodal.autointerp.prompts import PromptBook
    from sae_lens_multimodal.features.store import FeatureStore

EXPLANATIONS_FOLDER = "explanations"
SCORES_FOLDER = "scores"
MEASURES_FOLDER = "measures"
ANSWERS_FILE = "answers.sqlite"
CALIBRATION_FILE = "calibration.json"


def explain(options: Namespace) -> None:
    """Have a VLM explain features."""
    from sae_lens_multimodal.autointerp.explain import explain as run
    from sae_lens_multimodal.autointerp.explainers.contrastive import Contrastive
    from sae_lens_multimodal.features.store import FeatureStore

    store = FeatureStore.open(options.store)
    output = options.output or options.store / EXPLANATIONS_FOLDER
    procedure = _procedure(options, store)
    arguments: dict[str, Any] = {
        "features": parse_features(options.features),
        "prompts": make_prompts(options),
        "procedure": procedure,
        "seed": options.seed,
    }
    if options.dry_run:
        foretell(options, lambda judge, folder: run(store, judge, output=folder, **arguments))
        if isinstance(procedure, Contrastive):
            _say_most_calls(procedure)
        return
    explanations = run(store, make_judge(options, options.store / ANSWERS_FILE), output=output, **arguments)
    failures = [explanation.failure for explanation in explanations if explanation.failure is not None]
    print_lines(f"{len(explanations) - len(failures)} features answered, {len(failures)} failed: {output.resolve()}")
    if failures:
        sys.stderr.write(f"first failure: {failures[0].message}\n")


def score(options: Namespace) -> None:
    """Have a judge score explanations."""
    from sae_lens_multimodal.autointerp.explanation import read_explanations
    from sae_lens_multimodal.autointerp.score import score as run
    from sae_lens_multimodal.autointerp.scorers import Sampling
    from sae_lens_multimodal.features.store import FeatureStore

    store = FeatureStore.open(options.store)
    output = options.output or options.store / SCORES_FOLDER
    explanations = read_explanations(explanations_of(options))
    arguments: dict[str, Any] = {
        "prompts": make_prompts(options),
        "scorers": options.scorers.split(","),
        "sampling": Sampling(n_positive=options.items, n_negative=options.items),
        "seed": options.seed,
    }
    if options.dry_run:
        foretell(options, lambda judge, folder: run(store, judge, explanations, output=folder, **arguments))
        return
    run(store, make_judge(options, options.store / ANSWERS_FILE), explanations, output=output, **arguments)
    print_lines(str(output.resolve()))


def calibrate(options: Namespace) -> None:
    """Ask a judge what is known, and say how far it can be trusted."""
    from sae_lens_multimodal.autointerp.calibration import calibrate as run
    from sae_lens_multimodal.autointerp.calibration_text import agreement_line, calibration_lines
    from sae_lens_multimodal.autointerp.general_prompts import GeneralPrompts
    from sae_lens_multimodal.files import read_json, write_json
    from sae_lens_multimodal.scenes.planted import planted_features

    others = [read_json(folder / CALIBRATION_FILE) for folder in options.compare]
    planted = planted_features(options.features, n_regions=options.regions, seed=options.seed)
    book = make_prompts(options) or GeneralPrompts()
    if options.dry_run:
        foretell(options, lambda judge, _: run(judge, planted, book, seed=options.seed))
        return
    answers = None if options.output is None else options.output / ANSWERS_FILE
    found = run(make_judge(options, answers), planted, book, seed=options.seed)
    print_lines(*calibration_lines(found), *(agreement_line(found, other) for other in others))
    if options.output is not None:
        write_json(options.output / CALIBRATION_FILE, found.to_json())


def explanations_of(options: Namespace) -> Path:
    """Find the explanations that the options name, or those in the store.

    Raises:
        ConfigError: none are named and the store has none.
    """
    inside: Path = options.store / EXPLANATIONS_FOLDER
    if options.explanations is None and not inside.exists():
        raise ConfigError(f"{inside} does not exist; name the folder or file of the explanations with --explanations.")
    return options.explanations or inside


def _procedure(options: Namespace, store: FeatureStore) -> Procedure:
    from sae_lens_multimodal.autointerp.explainers.contrastive import Contrastive
    from sae_lens_multimodal.autointerp.explainers.general import General
    from sae_lens_multimodal.autointerp.explainers.joint import Joint
    from sae_lens_multimodal.autointerp.explainers.published import Published
    from sae_lens_multimodal.autointerp.explainers.words_first import WordsFirst
    from sae_lens_multimodal.autointerp.negatives import decoder_neighbours
    from sae_lens_multimodal.hooks.load_sae import load_sae

    if options.sae is None:
        some: tuple[type[Procedure], ...] = (General, WordsFirst, Contrastive, Joint, Published)
        return {procedure.name: procedure for procedure in some}[options.procedure.replace("-", "_")]()
    if options.procedure != "contrastive":
        raise ConfigError("--sae finds hard negatives for --procedure contrastive; the others need none.")
    return Contrastive(neighbours=decoder_neighbours(load_sae(options.sae), range(store.d_sae)))


def make_judge(options: Namespace, answers: Path | None) -> Judge:
    """Make the judge: within its budget, and with the answers that are known."""
    from sae_lens_multimodal.autointerp.judges import (
        Budget,
        BudgetJudge,
        CachedJudge,
        OpenAIJudge,
        Prices,
        TransformersJudge,
    )

    if options.base_url is not None:
        judge: Judge = OpenAIJudge(
            options.judge,
            base_url=options.base_url,
            api_key_variable=options.api_key_env,
            structured=options.structured,
        )
    else:
        judge = TransformersJudge(options.judge, device=options.device)
    if any(limit is not None for limit in (options.max_calls, options.max_tokens, options.max_money)):
        budget = Budget(
            max_calls=options.max_calls,
            max_tokens=options.max_tokens,
            max_money=options.max_money,
            prices=Prices(input_per_million=options.price_in, output_per_million=options.price_out),
        )
        judge = BudgetJudge(judge, budget, at_once=32)
    return judge if answers is None else CachedJudge(judge, answers)


def foretell(options: Namespace, run: Callable[[Judge, Path], object]) -> None:
    """Let a stand-in be asked in a folder that is thrown away, and print what it counted."""
    from sae_lens_multimodal.autointerp.judges import ForecastJudge

    known = getattr(options, "store", None) or options.output
    answers = None if known is None or not (known / ANSWERS_FILE).is_file() else known / ANSWERS_FILE
    judge = ForecastJudge(make_judge(options, answers), tokens_per_picture=options.tokens_per_picture)
    with tempfile.TemporaryDirectory() as folder:
        run(judge, Path(folder) / "dry-run")
    print_lines(judge.forecast.line())


def _say_most_calls(procedure: Contrastive) -> None:
    print_lines(
        "The contrastive procedure then tries what is proposed: how often depends on the answers, at most "
        f"{procedure.most_calls} calls a feature."
    )


def make_prompts(options: Namespace) -> PromptBook | None:
    """Make the prompt book that `--dialect` asks for; None for the general one."""
    if options.dialect == "general":
        return None
    if options.dialect == "scenes":
        from sae_lens_multimodal.scenes.prompt_book import scenes_prompt_book

        return scenes_prompt_book()
    raise ConfigError(f"dialect is {options.dialect!r}; expected 'general' or 'scenes'.")


def print_lines(*lines: str) -> None:
    """Print results."""
    sys.stdout.write("\n".join(lines) + "\n")
