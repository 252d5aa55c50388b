"""Atomic file writes, snapshots, the workdir, compiled programs, preemption, devices and processes."""
