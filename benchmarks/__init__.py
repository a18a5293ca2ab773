"""Measurements of textmill beside its peers: `python -m benchmarks.data` and `python -m benchmarks.train`.

Each compares in one run, contender after contender and round after round, so that a busy moment of the machine meets them all.
Ratios of medians are what may be compared between machines.
"""
