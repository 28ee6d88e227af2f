"""What the other packages stand on: errors, files, logging, configuration, processes, rotations, losses, metrics."""
