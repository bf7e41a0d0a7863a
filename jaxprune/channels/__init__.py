"""Coupled channels: which there are, and which go."""
