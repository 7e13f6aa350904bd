"""What is saved and whose it is: rolling checkpoints, the folder of a run, published model files."""
