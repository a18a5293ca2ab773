"""The assets of the lineage."""
