"""The command that measures explanations in numbers: its flags, and the measures that they ask for."""

from __future__ import annotations

import argparse
from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sae_lens_multimodal.cli.autointerp import (
    ANSWERS_FILE,
    MEASURES_FOLDER,
    explanations_of,
    foretell,
    make_judge,
    make_prompts,
    print_lines,
)
from sae_lens_multimodal.errors import ConfigError

if TYPE_CHECKING:
    from sae_lens_multimodal.autointerp.judges.base import Judge
    from sae_lens_multimodal.autointerp.measurer import Measurer
    from sae_lens_multimodal.autointerp.prompts import PromptBook
    from sae_lens_multimodal.features.store import FeatureStore
    from sae_lens_multimodal.types import Conversation

MEASURERS = ("intruder", "simulation", "embedding", "masks", "steering", "surprisal")
_ASK_NOBODY = frozenset({"embedding", "masks"})
_FORETOLD = frozenset({"intruder", "simulation", "surprisal"})
"""What these ask does not depend on what a model answers."""


def add_measure_flags(parser: argparse.ArgumentParser) -> None:
    """Describe the command, apart from its judge. Imports nothing heavy."""
    parser.add_argument("--explanations", type=Path, help="explanations.jsonl (default: the store's own)")
    parser.add_argument("--output", type=Path, help="folder for measures.jsonl (default: inside the store)")
    parser.add_argument(
        "--scorers", nargs="+", default=["intruder,simulation"], metavar="NAME", help=", ".join(MEASURERS)
    )
    parser.add_argument("--items", type=int, help="trials, pictures or regions a feature (default: each scorer's own)")
    parser.add_argument("--shown", type=int, default=4, help="intruder: regions shown at a time (default: %(default)s)")
    parser.add_argument("--grid", default="4x4", metavar="ROWSxCOLUMNS", help="simulation (default: %(default)s)")
    parser.add_argument("--embedding", metavar="MODEL", help="embedding: a CLIP or SigLIP, hub name or folder")
    parser.add_argument("--masks", type=Path, metavar="FOLDER", help="masks: PNG files and a list, masks.jsonl")
    parser.add_argument("--segmenter", metavar="MODEL", help="masks: SAM 3; with --detector, SAM or SAM 2")
    parser.add_argument("--detector", metavar="MODEL", help="masks: a Grounding DINO that finds boxes for --segmenter")
    parser.add_argument("--model", help="steering: the model that the SAE reads, hub name or folder")
    parser.add_argument("--sae", type=Path, help="steering: folder of the SAE")
    parser.add_argument("--dtype", help="steering: of the model (default: the checkpoint's)")
    parser.add_argument(
        "--prompt", action="append", default=[], help="steering: what the model is asked (repeat for several)"
    )
    parser.add_argument(
        "--image", type=Path, action="append", default=[], help="steering: a picture before each prompt (repeat)"
    )
    parser.add_argument(
        "--strength", type=float, default=2.0, help="steering: in the feature's 99th percentiles (default: %(default)s)"
    )
    parser.add_argument("--max-new-tokens", type=int, default=32, help="steering: longest answer")
    parser.add_argument("--seed", type=int, default=0)


def measure(options: Namespace) -> None:
    """Measure explanations in numbers."""
    from sae_lens_multimodal.autointerp.explanation import read_explanations
    from sae_lens_multimodal.autointerp.measure_summary import measure_lines
    from sae_lens_multimodal.autointerp.measures import measure as run
    from sae_lens_multimodal.features.store import FeatureStore

    names = _names(options)
    store = FeatureStore.open(options.store)
    explanations = read_explanations(explanations_of(options))
    output = options.output or options.store / MEASURES_FOLDER
    if options.dry_run:
        _foretell(options, names, store, explanations)
        return
    judge = make_judge(options, options.store / ANSWERS_FILE) if set(names) - _ASK_NOBODY else None
    found = run(store, explanations, _measurers(options, names, store, judge), output=output, seed=options.seed)
    print_lines(*measure_lines(found, seed=options.seed), str(output.resolve()))


def _names(options: Namespace) -> list[str]:
    """Read which scorers are wanted, with blanks or commas between them, and check that each has what it needs."""
    names = [name.strip() for part in options.scorers for name in part.split(",")]
    unknown = [name for name in names if name not in MEASURERS]
    if unknown:
        raise ConfigError(f"--scorers got {unknown[0]!r}; expected some of {', '.join(MEASURERS)}.")
    asking = [name for name in names if name not in _ASK_NOBODY]
    if asking and options.judge is None:
        raise ConfigError(f"--judge is missing; {', '.join(asking)} ask{'s' * (len(asking) == 1)} one.")
    if "steering" in names and (options.model is None or options.sae is None or not options.prompt):
        raise ConfigError("steering needs --model, --sae and at least one --prompt.")
    if "masks" in names and options.masks is not None and options.segmenter is not None:
        raise ConfigError("got both --masks and --segmenter; expected one source of masks.")
    if options.detector is not None and options.segmenter is None:
        raise ConfigError("--detector finds boxes only; give --segmenter, too, to fill them.")
    return names


def _foretell(options: Namespace, names: list[str], store: FeatureStore, explanations: list[Any]) -> None:
    from sae_lens_multimodal.autointerp.measures import measure as run

    foretold = [name for name in names if name in _FORETOLD]
    if foretold:
        foretell(
            options,
            lambda judge, folder: run(
                store, explanations, _measurers(options, foretold, store, judge), output=folder, seed=options.seed
            ),
        )
    if "steering" in names:
        most = 2 * 3 * len(options.prompt)
        print_lines(f"steering asks about what the model answers, in at most {most} calls a feature.")
    nobody = [name for name in names if name in _ASK_NOBODY]
    if nobody:
        print_lines(f"{' and '.join(nobody)}: no judge is asked.")


def _measurers(options: Namespace, names: list[str], store: FeatureStore, judge: Judge | None) -> list[Measurer]:
    book = make_prompts(options)
    if book is None:
        from sae_lens_multimodal.autointerp.general_prompts import GeneralPrompts

        book = GeneralPrompts()
    if judge is None:
        return [_without_judge(options, name) for name in names]
    return [
        _without_judge(options, name) if name in _ASK_NOBODY else _with_judge(options, name, store, judge, book)
        for name in names
    ]


def _without_judge(options: Namespace, name: str) -> Measurer:
    number: dict[str, Any] = {} if options.items is None else {"n_items": options.items}
    if name == "embedding":
        from sae_lens_multimodal.autointerp.embedding import TextImageEmbedding
        from sae_lens_multimodal.autointerp.scorers.embedding import EmbeddingScorer

        given = options.embedding
        return EmbeddingScorer(
            None if given is None else TextImageEmbedding.load(given, device=options.device), **number
        )
    from sae_lens_multimodal.autointerp.mask_files import FolderMasks
    from sae_lens_multimodal.autointerp.scorers.masks import MaskScorer
    from sae_lens_multimodal.autointerp.segmenters import GroundedSamSegmenter, Sam3Segmenter

    if options.masks is not None:
        given_masks = FolderMasks(options.masks)
        return MaskScorer(given_masks, source=given_masks.source, **number)
    if options.segmenter is None:
        return MaskScorer(None, source="none", **number)
    found = (
        Sam3Segmenter.load(options.segmenter, device=options.device)
        if options.detector is None
        else GroundedSamSegmenter.load(options.detector, options.segmenter, device=options.device)
    )
    return MaskScorer(found, source=found.source, **number)


def _with_judge(options: Namespace, name: str, store: FeatureStore, judge: Judge, book: PromptBook) -> Measurer:
    from sae_lens_multimodal.autointerp.scorers.intruder import IntruderScorer
    from sae_lens_multimodal.autointerp.scorers.simulation import SimulationScorer
    from sae_lens_multimodal.autointerp.scorers.surprisal import SurprisalScorer

    n = options.items
    if name == "intruder":
        return IntruderScorer(judge, book, n_shown=options.shown, **({} if n is None else {"n_trials": n}))
    if name == "simulation":
        rows, columns = _grid(options.grid)
        numbers = {} if n is None else {"n_firing": n, "n_silent": (n + 1) // 2}
        return SimulationScorer(judge, book, rows=rows, columns=columns, **numbers)
    if name == "surprisal":
        return SurprisalScorer(judge, book, **({} if n is None else {"n_items": n}))
    return _steering(options, store, judge, book)


def _steering(options: Namespace, store: FeatureStore, judge: Judge, book: PromptBook) -> Measurer:
    from sae_lens_multimodal.adapters.model import load_model
    from sae_lens_multimodal.autointerp.scorers.steering import SteeringScorer
    from sae_lens_multimodal.hooks.load_sae import load_sae

    return SteeringScorer(
        load_model(options.model, device=options.device, dtype=options.dtype),
        load_sae(options.sae, options.device),
        store,
        judge,
        book,
        [_conversation(options, prompt) for prompt in options.prompt],
        strength=options.strength,
        max_new_tokens=options.max_new_tokens,
    )


def _conversation(options: Namespace, prompt: str) -> Conversation:
    pictures = [{"type": "image", "image": str(path)} for path in options.image]
    return [{"role": "user", "content": [*pictures, {"type": "text", "text": prompt}]}]


def _grid(text: str) -> tuple[int, int]:
    """Read the size of a grid.

    Example:
        >>> _grid("3x4")
        (3, 4)
    """
    rows, _, columns = text.partition("x")
    if not (rows.isdecimal() and columns.isdecimal() and int(rows) and int(columns)):
        raise ConfigError(f"--grid got {text!r}; expected ROWSxCOLUMNS such as 4x4.")
    return int(rows), int(columns)
