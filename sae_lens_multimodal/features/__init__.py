"""What every feature responds to: one pass over a dataset, and the store it leaves on disk."""
