"""Errors with one line for the user, atomic files and locks, stop requests, log lines, limits of containers. Knows nothing of the rest."""
