"""File formats: images, depth, point clouds and archives."""
