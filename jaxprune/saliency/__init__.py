"""What a weight is worth: one family of criteria per file."""
