"""Data preparation and training of decoder language models: a library and two command-line tools.

Knows neither Dagster nor DuckDB; `pipeline` builds on it.
"""
