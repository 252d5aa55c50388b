"""From a trained model to decisions: anomaly maps, object recognition, thresholds, evaluation and the detector."""
