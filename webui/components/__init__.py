"""Pieces of pages that know nothing of files: they turn values into HTML."""
