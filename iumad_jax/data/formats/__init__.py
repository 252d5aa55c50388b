"""Files as cameras and archives write them: images, depth, point clouds, archives."""
