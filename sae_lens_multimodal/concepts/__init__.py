"""Concept dictionaries: directions of the residual stream found for a word, grounded in pictures and words."""
