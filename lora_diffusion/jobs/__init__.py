"""Runs that survive: a queue, the process that works through it, and what others may read of a run (no torch)."""
