"""Pruning over time: every method is an optax transform."""
