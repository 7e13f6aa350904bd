"""The mathematics of DDPM and the network. Imports nothing else of the project, so it can be read and used alone."""
