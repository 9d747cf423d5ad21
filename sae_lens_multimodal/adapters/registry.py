"""Finding the adapter of a model family by its `config.model_type`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import TypeAlias

from sae_lens_multimodal.adapters.family import Family
from sae_lens_multimodal.errors import ConfigError, UnsupportedModelError

ENTRY_POINT_GROUP = "sae_lens_multimodal.adapters"
"""Other packages add families here: the entry point's name is the model type, its object a `Family` subclass."""

GENERIC = "generic"
"""The fallback for models without an adapter: it has to be asked for, and is no family of its own."""
GUIDE = "docs/adding_a_family.md in the repository of sae-lens-multimodal"
"""The page that leads through writing an adapter."""

FamilyFactory: TypeAlias = Callable[[], type[Family]]

_factories: dict[str, FamilyFactory] = {}


def family(model_type: str) -> Callable[[FamilyFactory], FamilyFactory]:
    """Register a function that imports and returns the adapter for `config.model_type`."""

    def register(factory: FamilyFactory) -> FamilyFactory:
        if model_type in _factories:
            raise ConfigError(f"the model family {model_type!r} is registered twice; expected one adapter for each.")
        _factories[model_type] = factory
        return factory

    return register


def registered_families(*, built_in: bool = False) -> list[str]:
    """Return the model types that have an adapter, built in or, unless `built_in`, from an entry point."""
    return sorted(_factories if built_in and _all_factories() else _all_factories())


def find_family(model_type: str, *, name: str = "the model") -> type[Family]:
    """Return the adapter class for a model type.

    Args:
        model_type: `config.model_type`.
        name: what to call the model in the error.

    Raises:
        UnsupportedModelError: no adapter is registered for it.
        ConfigError: the entry point of another package does not give one.
    """
    if model_type == GENERIC:
        from sae_lens_multimodal.adapters.generic import Generic

        return Generic
    factories = _all_factories()
    if model_type not in factories:
        raise UnsupportedModelError(
            f"{name} is of the family {model_type!r}, which has no adapter; supported are "
            f"{', '.join(sorted(factories))}. Load it with family={GENERIC!r} for everything that needs no places in "
            f"pictures, or add an adapter: {GUIDE} leads through it."
        )
    return factories[model_type]()


def _all_factories() -> dict[str, FamilyFactory]:
    import_module("sae_lens_multimodal.adapters.families")
    outside = {entry.name: partial(_from_entry_point, entry) for entry in entry_points(group=ENTRY_POINT_GROUP)}
    # a built-in family wins: an installed package must not change it unseen
    return {**outside, **_factories}


def _from_entry_point(entry: EntryPoint) -> type[Family]:
    package = f" of the package {entry.dist.name}" if entry.dist else ""
    described = f"the entry point {entry.name} = {entry.value!r}{package}"
    try:
        found = entry.load()
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"{described} cannot be imported: {error}. Update or uninstall that package; if it is yours, see {GUIDE}."
        ) from error
    if not (isinstance(found, type) and issubclass(found, Family)):
        raise ConfigError(f"{described} is {found!r}; expected a subclass of adapters.family.Family: see {GUIDE}.")
    return found
