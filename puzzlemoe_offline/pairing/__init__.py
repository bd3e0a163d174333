"""Which experts merge."""
