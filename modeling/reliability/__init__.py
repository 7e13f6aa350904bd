"""Errors with one line for the user, atomic files and locks, stop requests by signals. Knows nothing of the rest."""
