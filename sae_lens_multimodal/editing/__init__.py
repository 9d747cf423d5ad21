"""Model editing: one fact changed by a rank-one update, measured, reversible."""
