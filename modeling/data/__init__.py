"""Data: any image source becomes one folder of checked uint8 arrays. Knows nothing of models."""
