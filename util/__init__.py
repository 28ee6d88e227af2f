"""Arguments, configuration, training and evaluation loops, losses and metrics."""
