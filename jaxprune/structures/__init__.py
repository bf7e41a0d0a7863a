"""Masks that hardware likes: N:M, whole slices, blocks."""
