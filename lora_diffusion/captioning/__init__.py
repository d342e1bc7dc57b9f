"""Captions written by a model that looks at the pictures."""
