"""The keeper of a worker: see `keeper.py`. Standard library only, nothing of an image is ever parsed here."""
