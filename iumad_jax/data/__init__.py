"""Data pipeline from files to batches: readers, file formats, depth processing, prepared images."""
