"""Decisions about artifacts, between the assets and the library."""
