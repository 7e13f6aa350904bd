"""Pages for people: what runs have published, as one self-contained HTML file. Imports no torch."""
