"""Seeing runs: as a table, live in the terminal, as one HTML page."""
