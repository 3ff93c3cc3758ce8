"""Decoders in Flax NNX, and the tables that tie them to Hugging Face checkpoints."""
