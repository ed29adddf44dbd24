"""Measures of attention heads: each module scores every head of a model, for `heads="file.json:top20"`."""
