"""Every error that the package raises on purpose, in one tree.

A message says what was got, what was expected and what to do about it, in one line: the command line prints it as it
is, without a traceback.
"""


class MultimodalError(Exception):
    """The root of the tree: a mistake or a circumstance that the user can do something about."""


class ConfigError(MultimodalError, ValueError):
    """A setting has a value that cannot work."""


class ModelLoadError(MultimodalError, OSError):
    """A model or processor could not be loaded from a hub name or folder."""


class UnsupportedModelError(ModelLoadError):
    """The model was found, but no adapter knows its family."""


class UnknownHookError(MultimodalError, KeyError):
    """A hook name or module path that the model does not have."""

    def __str__(self) -> str:
        return str(self.args[0]) if self.args else ""


class PromptError(MultimodalError, ValueError):
    """Chat messages that cannot be encoded: wrong shape, or pictures and placeholders that do not match."""


class ImageError(MultimodalError, ValueError):
    """A picture that cannot be opened or has no pixels."""


class LayoutError(MultimodalError, ValueError):
    """Tokens and pictures that do not lie as the model's own code lays them."""


class SAEMismatchError(MultimodalError, ValueError):
    """A sparse autoencoder that does not belong to the model or hook it is used with."""


class FeatureError(MultimodalError, IndexError):
    """A feature index that the sparse autoencoder or the store does not have."""


class SelectionError(MultimodalError, ValueError):
    """A choice of tokens, steps or regions that selects nothing or lies outside."""


class DatasetError(MultimodalError, ValueError):
    """A dataset that cannot be read, or has no usable column or row."""


class StoreError(MultimodalError, OSError):
    """A folder on disk that is not what it should be: another run's, another schema's, or incomplete."""


class EditError(MultimodalError, ValueError):
    """An edit of a model's weights that cannot be made, or does not belong to the model it is applied to."""


class JudgeError(MultimodalError, RuntimeError):
    """A judge (explainer or scorer model) that cannot be asked at all."""


class NoGapError(MultimodalError, ValueError):
    """A clean and a corrupted prompt that the model answers alike, so that there is nothing to trace."""
