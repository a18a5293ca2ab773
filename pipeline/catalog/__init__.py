"""What was made from what, in DuckDB. The only package that holds SQL; the files on disk stay the truth."""
