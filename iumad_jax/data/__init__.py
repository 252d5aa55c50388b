"""Data pipeline from files to batches: readers, file formats, depth, prepared images and batches."""
