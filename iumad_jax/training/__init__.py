"""One step's training: what is planned, an update, the epochs, and numbers that are not finite."""
