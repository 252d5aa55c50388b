"""Files that are there whole, snapshots, the workdir, preemption, devices and processes."""
