"""Pruning with inverse curvature: what to remove, what is left, and how it stays removed."""
