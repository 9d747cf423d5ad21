"""Exporting features in Neuronpedia's own formats: the folder that its importer reads, and what its interface takes.

The layout and the names of the fields are those of SAEDashboard (`neuronpedia_export.py`) and of Neuronpedia
(`lib/db/import.ts`, `prisma/schema.prisma`, `api/feature/upload-batch`), as of August 2026.
"""

from __future__ import annotations

import gzip
import json
import re
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from sae_lens_multimodal.errors import ConfigError, StoreError
from sae_lens_multimodal.files import MANIFEST_NAME, read_json, write_bytes, write_manifest
from sae_lens_multimodal.report.formats import utf8
from sae_lens_multimodal.report.gather import name_of
from sae_lens_multimodal.report.neuronpedia_rows import FeatureRows, RowMaker
from sae_lens_multimodal.report.runs import SortedRun

if TYPE_CHECKING:
    from sae_lens_multimodal.features.store import FeatureStore
    from sae_lens_multimodal.report.records import Run

KIND, SCHEMA_VERSION = "neuronpedia-export", 1
BATCH = 128
"""Features to a file; the most that one upload may hold."""
IMPORTER = "clkht01d40000jv08hvalcvly"
"""The user that imported data belong to unless another one is given, as in SAEDashboard."""


@dataclass(frozen=True, kw_only=True)
class NeuronpediaNames:
    """What things are called at Neuronpedia, and whose they are."""

    model_id: str | None = None
    """Letters, digits, dashes and underscores. None: made from the name of the store's model."""
    source_set: str = "multimodal"
    """Name of the set of SAEs; with the layer before it, it names the SAE."""
    layer: int | None = None
    """None: that of the store's hook."""
    release: str = "sae-lens-multimodal"
    """Name of the release that the set belongs to."""
    description: str = "Features of a vision-language model"
    """Of the release and of the set."""
    creator_name: str = ""
    creator_id: str = IMPORTER
    """A user of the instance that imports."""
    url: str | None = None
    """Of the paper or the repository."""
    hf_repo: str | None = None
    """Where the SAE's weights are on the Hugging Face hub."""
    hf_folder: str | None = None
    explanation_type: str | None = None
    """A type of explanations that the instance knows; None for none, as it refuses others."""
    explanation_model: str | None = None
    """An explainer that the instance knows; None for none."""


@dataclass(frozen=True, kw_only=True)
class _Source:
    """One SAE on one model, as Neuronpedia names it."""

    model_id: str
    source_id: str
    names: NeuronpediaNames
    created: str


def export_neuronpedia(
    store: FeatureStore,
    output: Path | str,
    *,
    run: Run | None = None,
    output_tokens: Mapping[int, Sequence[tuple[str, float]]] | None = None,
    features: Sequence[int] | None = None,
    names: NeuronpediaNames | None = None,
    max_examples: int = 16,
    max_tokens: int = 128,
    progress: bool = True,
) -> Path:
    """Write a store's features as Neuronpedia imports them; see docs/report.md for what fits and what does not.

    Args:
        store: what every feature responds to.
        output: a new folder, or one with an earlier export, which is replaced.
        run: explanations and scores, as `read_run` reads them; measures and verdicts have no place there.
        output_tokens: tokens that a feature writes towards; None: those of the store's descriptions.
        features: which; None: all that were ever active.
        names: what things are called there.
        max_examples: of each list of each modality.
        max_tokens: tokens shown of each example, around the strongest; a picture counts as one. At most 1024.
        progress: show a bar on stderr.

    Returns:
        The folder of the source, as the importer expects it: `output/{model}/{layer}-{set}`.

    Raises:
        ConfigError: a name that Neuronpedia does not take, a hook without a layer, or too many tokens.
        FeatureError: a feature is not in the store.
        StoreError: the folder holds something else.
    """
    output, names = Path(output).resolve(), names or NeuronpediaNames()
    if not 1 <= max_tokens <= 1024 or max_examples < 1:
        raise ConfigError(f"max_tokens={max_tokens}, max_examples={max_examples}; expected 1 to 1024, and at least 1.")
    _check_output(output)
    source = _source(store, names)
    maker = RowMaker(
        store=store,
        run=None if run is None else SortedRun.of(run),
        output_tokens=output_tokens,
        model_id=source.model_id,
        source_id=source.source_id,
        names=names,
        created=source.created,
        max_examples=max_examples,
        max_tokens=max_tokens,
    )
    chosen = list(store.features if features is None else features)
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}.") as folder:
        building = Path(folder) / "export"
        part = building / source.model_id / source.source_id
        _write_heads(store, part, source)
        for number, start in enumerate(tqdm(range(0, len(chosen), BATCH), desc="export", disable=not progress)):
            rows = [maker.rows(feature) for feature in chosen[start : start + BATCH]]
            _write_batch(part, number, rows, source)
        settings = {"model_id": source.model_id, "source_id": source.source_id, "n_features": len(chosen)}
        write_manifest(building, kind=KIND, schema_version=SCHEMA_VERSION, settings=settings)
        if output.exists():
            output.rename(Path(folder) / "replaced")
        building.rename(output)
    return output / source.model_id / source.source_id


def _source(store: FeatureStore, names: NeuronpediaNames) -> _Source:
    layer = names.layer
    if layer is None:
        found = re.search(r"(?:^|\.)blocks\.(\d+)\.", store.hook_name)
        if found is None:
            raise ConfigError(f"the hook {store.hook_name!r} names no layer; give NeuronpediaNames(layer=...).")
        layer = int(found[1])
    model_id = names.model_id or _spelt(name_of(store.settings.get("model_name")) or "")
    for what, name in (("model_id", model_id), ("source_set", names.source_set)):
        if not re.fullmatch(r"[a-z0-9_-]{1,128}", name):
            raise ConfigError(f"{what} is {name!r}; Neuronpedia takes small letters, digits, dashes and underscores.")
    return _Source(
        model_id=model_id,
        source_id=f"{layer}-{names.source_set}",
        names=names,
        created=str(store.manifest.get("created", "")),
    )


def _spelt(name: str) -> str:
    """Make a name of what a hub or a folder calls a model.

    Example:
        >>> _spelt("llava-hf/Llama3-LLaVA.NeXT-8B")
        'llama3-llava-next-8b'
    """
    return re.sub(r"[^a-z0-9_-]+", "-", name.rpartition("/")[2].lower()).strip("-")


def _write_heads(store: FeatureStore, folder: Path, source: _Source) -> None:
    names, settings = source.names, store.settings
    owned = {"creatorId": names.creator_id, "createdAt": source.created}
    heads: dict[str, dict[str, Any]] = {
        "release": {
            "name": names.release,
            "description": names.description,
            "descriptionShort": names.description,
            "creatorName": names.creator_name,
            "creatorNameShort": names.creator_name,
            "urls": [names.url] if names.url else [],
            "visibility": "PUBLIC",
            **owned,
        },
        "model": {
            "id": source.model_id,
            "instruct": True,
            "displayName": source.model_id,
            "displayNameShort": source.model_id,
            "layers": 0,
            "neuronsPerLayer": 0,
            "owner": "",
            "visibility": "PUBLIC",
            "updatedAt": source.created,
            **owned,
        },
        "sourceset": {
            "modelId": source.model_id,
            "name": names.source_set,
            "description": names.description,
            "creatorName": names.creator_name,
            "releaseName": names.release,
            "urls": [names.url] if names.url else [],
            "visibility": "PUBLIC",
            **owned,
        },
        "source": {
            "id": source.source_id,
            "modelId": source.model_id,
            "setName": names.source_set,
            "dataset": name_of((settings.get("dataset") or {}).get("name")),
            "num_prompts": settings.get("n_prompts"),
            "num_tokens_in_prompt": settings.get("context_size"),
            "hfRepoId": names.hf_repo,
            "hfFolderId": names.hf_folder,
            "notes": f"Harvested from {store.hook_name} by sae-lens-multimodal.",
            "visibility": "PUBLIC",
            **owned,
        },
    }
    for name, row in heads.items():
        write_bytes(folder / f"{name}.jsonl", _lines([row]))


def _write_batch(folder: Path, number: int, batch: Sequence[FeatureRows], source: _Source) -> None:
    tables = {
        "features": [one.feature for one in batch],
        "activations": [row for one in batch for row in one.activations],
        "explanations": [row for one in batch for row in one.explanations],
        "explanation_scores": [row for one in batch for row in one.scores],
    }
    for name, rows in tables.items():
        if rows:
            packed = gzip.compress(_lines(rows), compresslevel=5, mtime=0)
            write_bytes(folder / name / f"batch-{number}.jsonl.gz", packed)
    uploaded = [one.upload for one in batch if one.upload["activations"]]
    if uploaded:
        body = {"modelId": source.model_id, "source": source.source_id, "features": uploaded}
        write_bytes(folder / "upload" / f"batch-{number}.json", _lines([body]))


def _lines(rows: Iterable[Mapping[str, Any]]) -> bytes:
    return "".join(json.dumps(_cleaned(row), allow_nan=False) + "\n" for row in rows).encode()


def _cleaned(value: Any) -> Any:  # noqa: ANN401 - any JSON value
    """Replace what a database refuses: half surrogate pairs, and the character 0."""
    if isinstance(value, str):
        return utf8(value).replace("\0", " ")
    if isinstance(value, Mapping):
        return {key: _cleaned(one) for key, one in value.items()}
    return [_cleaned(one) for one in value] if isinstance(value, list | tuple) else value


def _check_output(output: Path) -> None:
    """See that nothing of the user's own would be replaced."""
    if not output.exists():
        return
    if not output.is_dir():
        raise StoreError(f"{output} is a file; give a folder for the export.")
    found = {entry.name for entry in output.iterdir()}
    manifest = read_json(output / MANIFEST_NAME) if MANIFEST_NAME in found else {}
    if found and (not isinstance(manifest, dict) or manifest.get("kind") != KIND):
        raise StoreError(f"{output} is not empty and holds no export for Neuronpedia; give a new folder.")
