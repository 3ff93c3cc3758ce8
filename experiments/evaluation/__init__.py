"""Evaluation of checkpoints: suites, generations that resume, and their report."""
