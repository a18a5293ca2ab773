"""Benchmarks of textmill and its peers, such as `python -m benchmarks.data` and `python -m benchmarks.train`.

Each runs all contenders in turn in every round, so that a busy machine slows all of them. Compare ratios of medians, not figures
from different machines.
"""
