"""Names of folders that a library could take for something else than a name."""

# Of a URL, a pattern, a shell, SQL, a flag, a connection string.
PIECES = ["-x", " ", "ö", "%41", "#", "?y=1", "&", "'", '"', "\n", "[v1]", "*", "\\", "a,b", "md:x"]

# A name with all of them.
WORST_NAME = "".join(PIECES)
