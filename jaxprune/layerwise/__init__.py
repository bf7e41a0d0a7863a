"""Weights and masks together, one layer at a time: one method per file."""
