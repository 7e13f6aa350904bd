"""What people see of a run: the curves, the sample grids, what it says, and the W&B run."""
