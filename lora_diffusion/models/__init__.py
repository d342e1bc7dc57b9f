"""Base models: one file per family, what they share in `base`, loading and refusing in `load`."""
