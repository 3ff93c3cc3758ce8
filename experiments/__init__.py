"""Runnable experiments, one module each: `python -m experiments` lists them."""
