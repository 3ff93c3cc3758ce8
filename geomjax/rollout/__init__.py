"""Sampling from a model, and scoring of what was sampled."""
