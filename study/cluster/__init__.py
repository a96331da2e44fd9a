"""Ray clusters: reaching one, watching it, what its nodes have."""
