"""Numbers and pictures of a trained model: likelihood, FID and its relatives, nearest training images."""
