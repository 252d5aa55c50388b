"""Everything that only a GPU can tell, in one command: python -m kernels.benchmarks.gpu --out=FOLDER."""
