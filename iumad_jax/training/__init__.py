"""Training of a step: setup of a run, optimisers, updates, epochs, and checks of datasets and non-finite numbers."""
