"""The concepts command: gather a word's states, find concepts, name them and measure them."""

from __future__ import annotations

import argparse
import sys
from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sae_lens_multimodal.concepts.dictionary import ConceptDictionary

_METHODS = ("semi_nmf", "dictionary_learning", "pca", "kmeans", "simple", "random", "sae")
_PLACES = ("before", "predicting", "first", "last", "at", "mean")


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
    parser.add_argument("--question", help="for rows of picture and caption: ask this, the caption is the answer")
    parser.add_argument("--hook", help="where (default: the output of the last block)")
    parser.add_argument("--output", type=Path, required=True, help="folder for states and dictionary")
    parser.add_argument("-k", type=int, default=20, help="concepts (default: %(default)s)")
    parser.add_argument("--method", choices=_METHODS, default="semi_nmf", help="default: %(default)s")
    parser.add_argument("--sparsity", type=float, default=0.02, help="of Semi-NMF (default: %(default)s)")
    parser.add_argument("--sae", type=Path, help="for --method sae: folder of an SAE-Lens SAE")
    parser.add_argument(
        "--held-out", type=float, default=0.2, help="share of rows to measure on (default: %(default)s)"
    )
    parser.add_argument("--clip", metavar="NAME", help="CLIP or SigLIP, for CLIPScore")
    parser.add_argument("--bert", metavar="NAME", help="text encoder, for BERTScore")
    parser.add_argument("--noise", action="store_true", help="also measure with noise in the place of the pictures")
    parser.add_argument("--words", type=int, default=8, help="words shown of a concept (default: %(default)s)")
    parser.add_argument("--contrast", action="store_true", help="show words by what sets the concepts apart")
    parser.add_argument("--max-rows", type=int, help="rows to read at most")
    parser.add_argument("--batch-size", type=int, default=8, help="prompts a forward pass (default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, … (default: %(default)s)")
    parser.add_argument("--dtype", help="float32, bfloat16, … (default: the checkpoint's)")
    parser.add_argument("--seed", type=int, default=0)


def concepts(options: Namespace) -> None:
    """Gather, find, name, measure."""
    from sae_lens_multimodal.adapters.model import load_model
    from sae_lens_multimodal.concepts.dictionary import find_concepts
    from sae_lens_multimodal.concepts.evaluate import evaluate_concepts
    from sae_lens_multimodal.concepts.gather import gather_states
    from sae_lens_multimodal.errors import ConfigError
    from sae_lens_multimodal.files import write_json

    if not 0 <= options.held_out < 1:
        raise ConfigError(f"--held-out got {options.held_out}; expected a share from 0 up to, but without, 1.")
    model = load_model(options.model, device=options.device, dtype=options.dtype)
    wanted: dict[str, Any] = {
        name: getattr(options, name)
        for name in ("at", "question", "batch_size", "max_rows", "split", "image_folder", "seed")
    }
    gathered = gather_states(
        model, options.dataset, options.word, hook_name=options.hook, output=options.output / "states", **wanted
    )
    found_on, measured_on = gathered.split(1 - options.held_out, seed=options.seed)
    sae = _sae(options) if options.sae is not None else None
    dictionary = find_concepts(
        found_on, options.k, options.method, seed=options.seed, sparsity=options.sparsity, sae=sae
    )
    folder = dictionary.save(options.output / "dictionary")
    sys.stdout.write("\n".join([gathered.summary(), "", *concept_lines(model, dictionary, options)]) + "\n")
    if len(measured_on):
        noise = None
        if options.noise:
            noise = gather_states(
                model,
                options.dataset,
                options.word,
                hook_name=options.hook,
                output=options.output / "noise",
                pictures="noise",
                **wanted,
            )
        measured = evaluate_concepts(
            model,
            {options.method: dictionary},
            measured_on,
            dataset=options.dataset,
            noise=noise,
            clip=options.clip,
            bert=options.bert,
            seed=options.seed,
            split=options.split,
            image_folder=options.image_folder,
        )
        content = {"rows": measured.rows, "n_states": measured.n_states, "skipped": measured.skipped}
        write_json(options.output / "evaluation.json", content)
        lines = ["", f"on {measured.n_states} states that they were not found on:", *measured.lines()]
        sys.stdout.write("\n".join(lines) + "\n")
    sys.stdout.write(f"\n{folder.resolve()}\n")


def concept_lines(model: Any, dictionary: ConceptDictionary, options: Namespace) -> list[str]:  # noqa: ANN401
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


def _sae(options: Namespace) -> Any:  # noqa: ANN401 - an SAE of any architecture
    from sae_lens import SAE
    from safetensors import SafetensorError

    from sae_lens_multimodal.errors import StoreError
    from sae_lens_multimodal.hooks import concept_sae  # noqa: F401 - so that SAE-Lens can load dictionaries

    try:
        return SAE.load_from_disk(options.sae, device=options.device)
    except (OSError, KeyError, ValueError, TypeError, RuntimeError, SafetensorError) as error:
        raise StoreError(f"{options.sae} cannot be read as a SAE that SAE-Lens saved: {error}") from error
