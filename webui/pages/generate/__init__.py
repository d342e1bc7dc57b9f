"""The page Generate; `page.py` puts its pieces together."""
