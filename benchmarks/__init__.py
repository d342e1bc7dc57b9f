"""Measurements: how well recipes learn, and how fast and in how much memory."""
