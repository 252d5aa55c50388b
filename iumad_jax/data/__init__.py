"""From files to batches: readers, formats, depth, prepared images and batches of them."""
