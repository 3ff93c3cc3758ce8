"""Proof on a CPU machine that a run fits a TPU slice: programs, chips, table."""
