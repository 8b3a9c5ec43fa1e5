"""Synthetic videos whose important moments need picture, text and sound together."""
