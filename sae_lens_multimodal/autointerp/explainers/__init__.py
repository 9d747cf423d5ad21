"""Explainers: ways to come from the examples of a feature to its explanation."""
