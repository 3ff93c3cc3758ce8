"""Prompts from a file to padded batches, and completions back to scores."""
