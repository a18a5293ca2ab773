"""The assets of the lineage, one file each, in the order the data flows."""
