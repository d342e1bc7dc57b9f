"""The page Adapters; `page.py` puts its pieces together."""
