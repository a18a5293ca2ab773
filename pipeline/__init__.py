"""The Dagster code location of textmill, a thin layer over the library `llm_core`. From the bottom up:

catalog       the DuckDB catalog: records, queries, rebuild
resources     storage, catalog and torchrun as Dagster resources
presentation  figures and tables for the asset pages and the terminal
failures      what a failed step reports, and whether it is retried
processes     torchrun, its ranks, and llm_core's tools as child processes
artifacts     decisions about artifacts: inputs of a step, reuse, evaluation, release, removal
assets        the eight assets with their checks and plots
automation    jobs, sensors and schedules
definitions   everything Dagster loads
cli           the `textmill` command
"""
