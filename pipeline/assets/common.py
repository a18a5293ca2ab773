"""What every asset of the lineage shares in the web UI."""

OWNERS = ["team:textmill"]
"""Who is asked about an asset; teams replace it with their own."""

DATA, MODEL = "data", "model"
"""Groups: preparation of the text, and what is made of it."""
