"""The drawn sample world: a miniature Stable Diffusion, its judge, and two data sets in a style."""
