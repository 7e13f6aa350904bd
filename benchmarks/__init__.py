"""Speed against what a user would take instead: `make bench`. docs/speed.md says what was measured, and where."""
