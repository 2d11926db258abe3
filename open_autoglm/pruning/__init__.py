"""Attention heads that a model can do without: found, removed, and only as far as the quality is kept."""
