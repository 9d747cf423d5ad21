"""Reading hooks, using SAEs on them, and steering, as ordinary nnsight interventions."""
