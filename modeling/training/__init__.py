"""Training: the loop, what each step sees, the optimizer, the EMA, and the state that a checkpoint holds."""
