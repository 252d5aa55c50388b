"""Images that are read, processed and encoded once: what a run, a detector and a picture read."""
