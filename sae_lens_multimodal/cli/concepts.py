"""The concepts command: gather a word's states, find concepts, name them and measure them."""

from __future__ import annotations

import argparse
import sys
from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sae_lens_multimodal.adapters.model import VisionLanguageModel
    from sae_lens_multimodal.concepts.dictionary import ConceptDictionary
    from sae_lens_multimodal.concepts.run import ConceptRun

# The help must not import what defines them; a test compares.
_METHODS = ("semi_nmf", "dictionary_learning", "pca", "kmeans", "simple", "random", "sae")
_PLACES = ("before", "predicting", "first", "last", "at", "mean")
_GATHERING = ("hook_name", "at", "every", "question", "batch_size", "max_rows", "split", "image_folder", "seed")
_DECOMPOSITION = ("k", "method", "sparsity", "offset")
_MEASURING = ("held_out", "noise", "clip", "bert", "bert_layer")
"""Which options become which arguments."""


def add_concepts(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Describe the command. Imports nothing heavy."""
    parser = commands.add_parser(
        "concepts",
        help="what the states of a word are made of: a dictionary of concepts",
        description="Gathers the states of a word over the rows whose caption holds it, finds concepts on some of them "
        "and measures them on the rest. The dictionary is saved as an SAE: harvest, explain, steer, attribute and "
        "report take it.",
    )
    parser.add_argument("--model", required=True, help="hub name or folder of a vision-language model")
    parser.add_argument("--dataset", required=True, help="hub name, folder, or .parquet/.json file")
    parser.add_argument("--split", default="train", help="split of the dataset (default: %(default)s)")
    parser.add_argument("--image-folder", help="where relative picture paths in the dataset begin")
    parser.add_argument("--word", required=True, help="a word or phrase, found as a whole")
    parser.add_argument("--at", choices=_PLACES, default="before", help="which states of it (default: %(default)s)")
    parser.add_argument("--every", action="store_true", help="every occurrence in a caption, not the first alone")
    parser.add_argument("--question", help="for rows of picture and caption: ask this, the caption is the answer")
    parser.add_argument("--hook", dest="hook_name", help="where (default: the output of the last block)")
    parser.add_argument("--output", type=Path, required=True, help="folder for states and dictionary")
    parser.add_argument("-k", type=int, default=20, help="concepts (default: %(default)s)")
    parser.add_argument("--method", choices=_METHODS, default="semi_nmf", help="default: %(default)s")
    parser.add_argument("--sparsity", type=float, default=0.02, help="of Semi-NMF (default: %(default)s)")
    parser.add_argument("--offset", action="store_true", help="of Semi-NMF: keep apart what all states share")
    parser.add_argument("--sae", type=Path, help="for --method sae: folder of an SAE-Lens SAE")
    parser.add_argument(
        "--held-out", type=float, default=0.2, help="share of rows to measure on (default: %(default)s)"
    )
    parser.add_argument("--clip", metavar="NAME", help="CLIP or SigLIP, for CLIPScore")
    parser.add_argument("--bert", metavar="NAME", help="text encoder, for BERTScore")
    parser.add_argument("--bert-layer", type=int, help="its hidden states (default: as published for it, or the last)")
    parser.add_argument("--noise", action="store_true", help="also score words with noise for the pictures")
    parser.add_argument("--words", type=int, default=8, help="words shown of a concept (default: %(default)s)")
    parser.add_argument(
        "--contrast",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="show words by what sets the concepts apart (default), or by all that they write",
    )
    parser.add_argument("--max-rows", type=int, help="rows to read at most")
    parser.add_argument("--batch-size", type=int, default=8, help="prompts a forward pass (default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, … (default: %(default)s)")
    parser.add_argument("--dtype", help="float32, bfloat16, … (default: the checkpoint's)")
    parser.add_argument("--seed", type=int, default=0)


def concepts(options: Namespace) -> None:
    """Gather, find, name, measure."""
    from sae_lens_multimodal.adapters.model import load_model
    from sae_lens_multimodal.concepts.run import Decomposition, Measuring, run_concepts
    from sae_lens_multimodal.hooks.load_sae import load_sae

    taken = vars(options)
    sae = None if options.sae is None else load_sae(options.sae, options.device)
    model = load_model(options.model, device=options.device, dtype=options.dtype)
    found = run_concepts(
        model,
        options.dataset,
        options.word,
        options.output,
        decomposition=Decomposition(sae=sae, **{name: taken[name] for name in _DECOMPOSITION}),
        measuring=Measuring(**{name: taken[name] for name in _MEASURING}),
        **{name: taken[name] for name in _GATHERING},
    )
    sys.stdout.write("\n".join(run_lines(model, found, options)) + "\n")


def run_lines(model: VisionLanguageModel, found: ConceptRun, options: Namespace) -> list[str]:
    """Lay out what was gathered, found and measured; the dictionary's folder is the last line."""
    lines = [found.states.summary(), "", *concept_lines(model, found.dictionary, options)]
    if found.evaluation is not None:
        measured = found.evaluation
        lines += ["", f"on {measured.n_states} states that they were not found on:", *measured.lines()]
    return [*lines, "", str(found.folder.resolve())]


def concept_lines(model: VisionLanguageModel, dictionary: ConceptDictionary, options: Namespace) -> list[str]:
    """A line for each concept: its words and the rows on which it is strongest."""
    lines = ["concept  words  (rows where it is strongest)"]
    if dictionary.concepts.shape[1] != model.d_model:
        words: list[list[tuple[str, float]]] = [[] for _ in range(dictionary.k)]
    else:
        words = dictionary.words(model, options.words, contrast=options.contrast)
    for concept, own in enumerate(words):
        rows = ", ".join(str(row) for row, _ in dictionary.top_states(concept, 3))
        feature = f" = feature {dictionary.features[concept]}" if dictionary.features else ""
        lines.append(f"{concept:>7}{feature}  {' '.join(word for word, _ in own)}  ({rows or 'none'})")
    return lines
