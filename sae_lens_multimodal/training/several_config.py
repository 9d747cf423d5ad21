"""The settings of a run that trains several SAEs at once: SAE-Lens's `saes` and `hook_names`, and what all share."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sae_lens.saes.sae import TrainingSAEConfig

from sae_lens_multimodal.errors import ConfigError
from sae_lens_multimodal.training.checkpoint import LATEST, run_id
from sae_lens_multimodal.training.config import MultimodalSAERunnerConfig, build_config
from sae_lens_multimodal.training.config_file import apply_overrides, read_yaml
from sae_lens_multimodal.training.typed_fields import as_mapping

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
_OF_EACH = ("sae", "hook_name", "output_path")


class MultimodalMultiSAERunnerConfig:
    """Several SAEs of one model, at any of its hooks, trained from one forward pass.

    `saes` and `hook_names` are those of SAE-Lens's `MultiSAETrainingRunnerConfig`; every other setting is one of
    `MultimodalSAERunnerConfig` and holds for all. Each SAE is saved in a folder of its name below `output_path`.
    """

    parts: dict[str, MultimodalSAERunnerConfig[Any]]
    """For each SAE the settings of a run that trains it alone."""

    def __init__(
        self,
        *,
        saes: Mapping[str, TrainingSAEConfig | Mapping[str, Any]],
        hook_names: Mapping[str, str] | str,
        **common: Any,  # noqa: ANN401 - the fields of another class
    ) -> None:
        """Check names, and build the settings of each SAE.

        Args:
            saes: for each SAE its configuration, or `{"architecture": ..., "d_sae": ...}`.
            hook_names: for each SAE its hook, or one for all.
            common: fields of `MultimodalSAERunnerConfig` except `sae` and `hook_name`.

        Raises:
            ConfigError: names that do not match or make no folder, or a field that cannot work.
        """
        _check_names(saes)
        if twice := [name for name in ("sae", "hook_name") if name in common]:
            raise ConfigError(f"Got saes and {twice[0]}; give {twice[0]} of each SAE in saes and hook_names.")
        hooks = _hook_of_each(saes, hook_names)
        base = common.get("output_path", "output")
        self.output_path: str | None = base
        if common.get("from_pretrained_path"):
            raise ConfigError("from_pretrained_path names one SAE, saes several; train that one by itself.")
        self.parts = {}
        for name, sae in saes.items():
            output = None if base is None else str(Path(base) / name)
            self.parts[name] = build_config({**common, "sae": sae, "hook_name": hooks[name], "output_path": output})
        self.checkpoint_path: str | None = common.get("checkpoint_path", "checkpoints")
        own = self.shared.checkpoint_path
        if self.checkpoint_path is not None and self.shared.resume_from_checkpoint == LATEST:
            own = f"{self.checkpoint_path}/{run_id(self.to_dict())}"
        for part in self.parts.values():
            # SAE-Lens gives each configuration a folder of its own below checkpoint_path; this is one run.
            part.checkpoint_path = own

    @property
    def shared(self) -> MultimodalSAERunnerConfig[Any]:
        """The first SAE's settings, for what all share."""
        return next(iter(self.parts.values()))

    @property
    def hook_names(self) -> dict[str, str]:
        """For each SAE its hook."""
        return {name: part.hook_name for name, part in self.parts.items()}

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON values; `from_dict` reads them."""
        common = {name: value for name, value in self.shared.to_dict().items() if name not in _OF_EACH}
        return {
            "saes": {name: _without_metadata(part.sae) for name, part in self.parts.items()},
            "hook_names": self.hook_names,
            **common,
            "checkpoint_path": self.checkpoint_path,
            "output_path": self.output_path,
        }

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> MultimodalMultiSAERunnerConfig:
        """Build the configuration from plain values, such as those of a YAML file.

        Raises:
            ConfigError: a field is unknown, missing, of the wrong type, or cannot work.
        """
        values = dict(content)
        saes = dict(as_mapping("saes", values.pop("saes", None)))
        if "hook_names" not in values:
            raise ConfigError("hook_names is missing; give a hook for each of saes, or one for all.")
        return cls(saes=saes, hook_names=values.pop("hook_names"), **values)


def load_run_config(
    path: str | Path, overrides: Sequence[str] = ()
) -> MultimodalSAERunnerConfig[Any] | MultimodalMultiSAERunnerConfig:
    """Read a YAML file of one SAE, or, where it has `saes`, of several; see `load_config`.

    Raises:
        ConfigError: the file cannot be read, or a field is unknown, of the wrong type, or cannot work.
    """
    content = apply_overrides(read_yaml(Path(path)), overrides)
    return MultimodalMultiSAERunnerConfig.from_dict(content) if "saes" in content else build_config(content)


def _without_metadata(sae: TrainingSAEConfig) -> dict[str, Any]:
    return {name: value for name, value in sae.to_dict().items() if name != "metadata"}


def _check_names(saes: Mapping[str, Any]) -> None:
    if not saes:
        raise ConfigError("saes is empty; give at least one, such as 'saes: {early: {architecture: topk, d_sae: 64}}'.")
    for name in saes:
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise ConfigError(f"saes names {name!r}, which makes no folder; use letters, digits, '_', '-' and '.'.")


def _hook_of_each(saes: Mapping[str, Any], hook_names: Mapping[str, str] | str) -> dict[str, str]:
    if isinstance(hook_names, str):
        return dict.fromkeys(saes, hook_names)
    if set(as_mapping("hook_names", hook_names)) != set(saes):
        raise ConfigError(f"hook_names has {sorted(hook_names)}, saes has {sorted(saes)}; give one hook for each SAE.")
    return dict(hook_names)
