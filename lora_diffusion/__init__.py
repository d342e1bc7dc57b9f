"""A LoRA trainer for Stable Diffusion UNets that one person can read in a day."""

__version__ = "0.1.0"
