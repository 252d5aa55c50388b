"""Incremental unified RGB-D anomaly detection in JAX."""
