"""Prepared sets: images that are read, processed and encoded once, for training, calibration and evaluation."""
