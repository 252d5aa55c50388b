"""Flax modules, without losses or data."""
