"""Automatic interpretation: a model explains features from regions and marked text, a judge tests the explanations."""
