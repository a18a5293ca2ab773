"""The Dagster code location of textmill: assets, jobs and the DuckDB catalog, thin over the library `llm_core`."""
