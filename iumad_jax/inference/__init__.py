"""From a trained model to decisions: prediction in batches, recognition, thresholds, evaluation, the detector."""
