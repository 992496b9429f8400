"""Training: from a config to a smaller model, a report and a checkpoint."""
