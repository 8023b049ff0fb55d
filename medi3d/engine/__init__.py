"""One training loop for volumes and clips: task, precision, trainer, handlers, metrics, inference."""
