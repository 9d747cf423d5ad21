"""Describing features after the pass: how alike what they fire on is, what they go with, what they write."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from sae_lens import SAE
from tqdm.auto import tqdm

from sae_lens_multimodal.adapters.model import VisionLanguageModel
from sae_lens_multimodal.errors import ConfigError, FeatureError, StoreError
from sae_lens_multimodal.features.description import FEATURES_FILE
from sae_lens_multimodal.features.embedding import Embed, tower_embedding
from sae_lens_multimodal.features.evidence import Evidence, ExampleReader
from sae_lens_multimodal.features.findings import described_tables
from sae_lens_multimodal.features.picture_vectors import CELLS, write_picture_vectors
from sae_lens_multimodal.features.sampled import SampledExamples
from sae_lens_multimodal.features.schema import DESCRIBED, DESCRIBED_KIND, DESCRIBED_VERSION, StorePaths
from sae_lens_multimodal.features.store import FeatureStore
from sae_lens_multimodal.features.tables import write_tables
from sae_lens_multimodal.files import read_json, read_manifest, write_json, write_manifest
from sae_lens_multimodal.hooks.saes import check_sae

logger = logging.getLogger(__name__)

_REQUEST = "request.json"


@dataclass(frozen=True, kw_only=True)
class DescriptionSettings:
    """What descriptions rest on."""

    n_examples: int = 4
    """Examples of each list, top and ordinary, of each modality."""
    n_cofiring: int = 8
    """Co-firing features to name."""
    n_neighbours: int = 8
    """Decoder neighbours to name."""
    n_writes: int = 8
    """Output tokens to name; 0 to leave them out."""
    crops: bool = True
    """Whether to compare crops, which takes a pass of the vision tower (or of `embed`) for each image example, and
    pictures, which takes a pass of the vision tower for each picture."""

    def check(self) -> None:
        """Refuse what cannot work.

        Raises:
            ConfigError: a number is out of range.
        """
        for name, least in (("n_examples", 1), ("n_cofiring", 0), ("n_neighbours", 1), ("n_writes", 0)):
            if getattr(self, name) < least:
                raise ConfigError(f"Got {name}={getattr(self, name)}; expected {least} or more.")


def describe_features(
    model: VisionLanguageModel,
    sae: SAE[Any],
    store: FeatureStore | Path | str,
    *,
    features: Sequence[int] | None = None,
    settings: DescriptionSettings | None = None,
    embed: Embed | None = None,
    embed_name: str | None = None,
    batch_size: int = 8,
    checkpoint_batches: int = 100,
    progress: bool = True,
) -> FeatureStore:
    """Add to a store what takes the model to find out about its features.

    For every feature: the monosemanticity of the crops where it fires; its cross-modal weight and the floor of that;
    the features that fire on its tokens; the nearest decoder directions, each with a hint at what it may be to the
    feature (a special case, a split, an absorption: see `features.relations`); and the output tokens that it makes
    likelier. See `features.similarity` for the formulas. Of every picture of the store also what the vision tower makes
    of each place in it, so that regions that look alike are found without the model: `FeatureStore.picture_vectors`.

    One pass over those prompts of the store that serve as one of these examples, so at most the dataset once more;
    what is read there goes into sums. Memory, with F features of width d, s = 4 * n_examples and K features active on a
    token: `F * (8 * d + 4 * d_embed) + 16 * F * s * K` bytes and the examples' firings, at most. A killed run goes on
    where its last checkpoint was and leaves the same tables.

    Args:
        model: The model that was harvested.
        sae: The SAE that was harvested.
        store: The store, or its folder.
        features: Which features; by default all that fire.
        settings: How many examples, neighbours and so on; None for the defaults.
        embed: Gives vectors of pictures, such as `TextImageEmbedding.load("openai/clip-vit-base-patch32").images`; by
            default the model's own vision tower.
        embed_name: What `embed` is called in the store.
        batch_size: Prompts to a forward pass.
        checkpoint_batches: Batches between checkpoints.
        progress: Show a progress bar on stderr.

    Returns:
        The store, reopened: see `FeatureStore.description`.

    Raises:
        StoreError: the folder is no feature store, or holds descriptions that were asked for otherwise.
        SAEMismatchError, FeatureError, ConfigError: the pieces do not fit together.
    """
    store = store if isinstance(store, FeatureStore) else FeatureStore.open(store)
    settings = settings or DescriptionSettings()
    settings.check()
    store.check_sae(sae)
    hook = check_sae(model, sae, store.hook_name)
    chosen = _chosen(store, features)
    name = embed_name or ("vision tower" if embed is None else getattr(embed, "__qualname__", type(embed).__name__))
    request = {
        **vars(settings),
        "features": None if features is None else chosen,
        "embedding": name if settings.crops else None,
        "batch_size": batch_size,
    }
    if _is_done(store.paths, request):
        logger.info("the features of %s are described already", store.folder)
        return store
    samples = SampledExamples(store.paths, chosen, settings.n_examples)
    embed = (embed or tower_embedding(model)) if settings.crops else None
    evidence = Evidence.empty(len(chosen), int(sae.cfg.d_in), int(sae.cfg.d_sae))
    reader = ExampleReader(model, sae, hook, store, samples, embed, evidence)
    _read(reader, store.paths, request, batch_size, checkpoint_batches, show=progress)
    if settings.crops:
        write_picture_vectors(
            model, store.image_ids, store.image, store.paths.picture_vectors, batch_size=batch_size, progress=progress
        )
    tables = described_tables(model, sae, store, chosen, evidence, settings, hook=hook)
    write_tables(store.paths.described / FEATURES_FILE, DESCRIBED, tables)
    found = {
        **request,
        "random_crops": evidence.random_crops(),
        "picture_cells": CELLS if settings.crops else None,
        "n_features": len(chosen),
    }
    write_manifest(store.paths.described, kind=DESCRIBED_KIND, schema_version=DESCRIBED_VERSION, settings=found)
    shutil.rmtree(_progress(store.paths))
    return store.reopened()


def _chosen(store: FeatureStore, features: Sequence[int] | None) -> list[int]:
    if features is None:
        return store.features
    unknown = sorted(set(features) - set(store.all_features))
    if unknown:
        raise FeatureError(
            f"feature {unknown[0]} is not in {store.folder}; it holds {len(store.all_features)} features."
        )
    return sorted(set(features))


def _progress(paths: StorePaths) -> Path:
    return paths.described / "progress"


def _is_done(paths: StorePaths, request: dict[str, Any]) -> bool:
    """Whether this very request was answered; begins it where nothing was asked yet."""
    folder = _progress(paths)
    unfinished = (folder / _REQUEST).is_file()
    if unfinished:
        earlier = read_json(folder / _REQUEST)
    elif paths.described.is_dir() and any(paths.described.iterdir()):
        earlier = read_manifest(paths.described, kind=DESCRIBED_KIND, schema_version=DESCRIBED_VERSION)["settings"]
    else:
        write_json(folder / _REQUEST, request)
        return False
    for name, wanted in request.items():
        if earlier.get(name) != wanted:
            raise StoreError(
                f"{paths.described} holds descriptions with another {name}; delete that folder to describe anew, or "
                "give the settings of those."
            )
    return not unfinished


def _read(
    reader: ExampleReader,
    paths: StorePaths,
    request: dict[str, Any],
    batch_size: int,
    checkpoint_batches: int,
    *,
    show: bool,
) -> None:
    """Go through what is left of the prompts."""
    file = _progress(paths) / "evidence.safetensors"
    done = reader.evidence.load(file)
    total = len(reader.samples.prompt_ids)
    starts = range(done, total, batch_size)
    read = partial(reader.read, size=batch_size)
    with tqdm(total=total, initial=done, unit="prompt", desc="describe", disable=not show) as bar, torch.no_grad():
        for index, start in enumerate(starts, start=1):
            read(start)
            bar.update(min(batch_size, total - start))
            if index % checkpoint_batches == 0:
                reader.evidence.save(file, start + batch_size)
    reader.evidence.save(file, total)
