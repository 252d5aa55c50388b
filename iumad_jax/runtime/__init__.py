"""Atomic file writes, snapshots, the workdir, preemption, devices and processes."""
