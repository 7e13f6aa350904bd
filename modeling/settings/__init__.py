"""Every key of the configuration, how a key is declared, and which images a network takes. Imports no torch."""
