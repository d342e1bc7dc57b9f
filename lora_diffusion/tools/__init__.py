"""Tools that work on adapter and base files without training: arithmetic of weight changes, and pictures of them."""
