"""Runnable experiments, one module each: `python -m experiments` lists them."""

import os

# Before NumPy loads: two matrices at a time beat one factored by two threads.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
