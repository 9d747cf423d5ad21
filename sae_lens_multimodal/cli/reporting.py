"""The commands `report` and `export`: their options, and which folders they read."""

from __future__ import annotations

import argparse
import sys
from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING

from sae_lens_multimodal.cli.autointerp import EXPLANATIONS_FOLDER, MEASURES_FOLDER, SCORES_FOLDER
from sae_lens_multimodal.cli.options import parse_features
from sae_lens_multimodal.errors import ConfigError

if TYPE_CHECKING:
    from sae_lens_multimodal.features.store import FeatureStore
    from sae_lens_multimodal.report.records import Run

Commands = argparse._SubParsersAction  # the only name argparse has for it


def add_report(commands: Commands[argparse.ArgumentParser]) -> None:
    """Describe the command. Imports nothing heavy."""
    report = commands.add_parser("report", help="a browsable report from a feature store")
    _add_findings(report)
    report.add_argument("--output", type=Path, required=True, help="folder of the report")
    report.add_argument(
        "--calibration",
        type=Path,
        action="append",
        default=[],
        help="what calibrate wrote; the report begins with it (repeat for several judges)",
    )
    report.add_argument("--title", help="title of the report")
    report.add_argument("--examples", type=int, default=16, help="examples of each kind (default: %(default)s)")
    report.add_argument("--workers", type=int, default=1, help="processes that make pages (default: %(default)s)")


def add_export(commands: Commands[argparse.ArgumentParser]) -> None:
    """Describe the command. Imports nothing heavy."""
    export = commands.add_parser(
        "export",
        help="features with all that was found out: one Parquet table, or Neuronpedia's formats",
        description="Give --table, --neuronpedia or both.",
    )
    _add_findings(export)
    export.add_argument("--table", type=Path, metavar="FILE", help="Parquet file with a row for each feature")
    export.add_argument("--neuronpedia", type=Path, metavar="FOLDER", help="folder in the layout of its importer")
    export.add_argument("--model-id", help="what Neuronpedia calls the model (default: made from the store's)")
    export.add_argument("--source-set", default="multimodal", help="what it calls the set (default: %(default)s)")
    export.add_argument("--creator", default="", help="your name there")


def _add_findings(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("store", type=Path, help="folder of a feature store (made by harvest)")
    parser.add_argument("--explanations", type=Path, help="folder or file of explanations (default: the store's own)")
    parser.add_argument("--scores", type=Path, help="folder of scores (default: the store's own)")
    parser.add_argument("--measures", type=Path, help="folder of measures (default: the store's own)")
    parser.add_argument("--features", metavar="N,N-N", help="which features (default: all that ever fired)")
    parser.add_argument(
        "--compare",
        action="append",
        default=[],
        metavar="NAME=FOLDER",
        help="another run over the same features: a folder of explanations, scores or measures, or one that holds "
        "such folders (repeat for several)",
    )
    parser.add_argument("--name", default="", help="what this run is called beside those of --compare")


def report(options: Namespace) -> None:
    """Make a report from what a store's folder holds."""
    from sae_lens_multimodal.features.store import FeatureStore
    from sae_lens_multimodal.report.build import build_report
    from sae_lens_multimodal.report.calibrated import read_calibration

    store = FeatureStore.open(options.store)
    own, *others = _runs(options, store)
    index = build_report(
        store,
        output=options.output,
        explanations=own.explanations,
        scores=own.scores,
        verdicts=own.verdicts,
        measures=own.measures,
        judge=own.judge,
        prompts=own.prompts,
        name=own.name,
        compare=others,
        calibrations=[read_calibration(path) for path in options.calibration],
        title=options.title or options.store.name,
        features=parse_features(options.features),
        max_examples=options.examples,
        workers=options.workers,
    )
    _print(str(index))


def export(options: Namespace) -> None:
    """Write a store's features in formats that other programs read."""
    from sae_lens_multimodal.features.store import FeatureStore
    from sae_lens_multimodal.report.neuronpedia import export_neuronpedia
    from sae_lens_multimodal.report.neuronpedia_heads import NeuronpediaNames
    from sae_lens_multimodal.report.table import export_table

    if options.table is None and options.neuronpedia is None:
        raise ConfigError("nothing to export was asked for; give --table FILE, --neuronpedia FOLDER or both.")
    store = FeatureStore.open(options.store)
    runs, features = _runs(options, store), parse_features(options.features)
    if options.table is not None:
        _print(str(export_table(store, options.table, runs=runs, features=features).resolve()))
    if options.neuronpedia is not None:
        names = NeuronpediaNames(model_id=options.model_id, source_set=options.source_set, creator_name=options.creator)
        _print(str(export_neuronpedia(store, options.neuronpedia, run=runs[0], features=features, names=names)))


def _runs(options: Namespace, store: FeatureStore) -> list[Run]:
    """Read the store's own run, or the one that the options name, and those that it is compared with."""
    from sae_lens_multimodal.autointerp.general_prompts import GeneralPrompts
    from sae_lens_multimodal.report.build import OWN_NAME
    from sae_lens_multimodal.report.runs import read_run
    from sae_lens_multimodal.scenes.prompt_book import scenes_prompt_book

    books = [GeneralPrompts(), scenes_prompt_book()]
    own = []
    for given, name in (
        (options.explanations, EXPLANATIONS_FOLDER),
        (options.scores, SCORES_FOLDER),
        (options.measures, MEASURES_FOLDER),
    ):
        # what was named must be there; what the store may hold need not
        if given is not None or (options.store / name).exists():
            own.append(given or options.store / name)
    if not own:
        sys.stderr.write(
            f"{options.store} holds no explanations, scores or measures; --explanations, --scores and --measures name "
            "those that lie elsewhere.\n"
        )
    runs = [read_run(own, name=options.name or (OWN_NAME if options.compare else ""), store=store, books=books)]
    for text in options.compare:
        name, equals, folder = text.partition("=")
        if not equals or not name or not folder:
            raise ConfigError(f"--compare got {text!r}; expected NAME=FOLDER such as contrastive=runs/contrastive.")
        runs.append(read_run([Path(folder)], name=name, store=store, books=books))
    return runs


def _print(*lines: str) -> None:
    sys.stdout.write("\n".join(lines) + "\n")
