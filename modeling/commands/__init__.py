"""Tools on the command line that are no stages: python -m modeling.commands.<name> --help."""
