"""The speed of this project beside that of its peers."""
