"""Errors of one line, atomic files and locks, stop requests, log lines, container limits. Knows nothing of the rest."""
