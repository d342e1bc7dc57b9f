"""Trainable changes of frozen layers: their arithmetic, and how they get into a model and out again."""
