"""Losses as pure functions `(params, context, batch) -> (loss, metrics)`."""
