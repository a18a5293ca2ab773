"""The lineage of all artifacts, in DuckDB. Only this package has SQL; the files on disk are the source of truth."""
