"""Measurements that need a GPU, in one command: python -m kernels.benchmarks.gpu --out=FOLDER."""
