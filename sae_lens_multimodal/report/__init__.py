"""A report on the features of a sparse autoencoder that opens from disk, without a network."""

from __future__ import annotations
