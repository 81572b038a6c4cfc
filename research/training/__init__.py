"""Training: from a resolved job to the loop, with what is due between two steps, checkpoints, anomalies and replay."""
