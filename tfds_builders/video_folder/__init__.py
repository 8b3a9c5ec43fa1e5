"""Data sets of people's own videos."""
