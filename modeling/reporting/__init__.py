"""What people see of a run: the curves, the sample grids, the progress bar, and the W&B run."""
