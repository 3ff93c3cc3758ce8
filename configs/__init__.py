"""Configurations, one `get_config(variant)` an experiment."""
