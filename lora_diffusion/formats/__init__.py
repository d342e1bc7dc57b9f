"""Adapter files: their names, their metadata, and reading and writing them. Knows adapters, no models."""
