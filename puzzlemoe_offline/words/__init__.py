"""Which words stand for a pair of weights."""
