"""Errors with one line for the user, atomic files and locks, stop requests, log lines. Knows nothing of the rest."""
