"""Single questions about the network, the samplers and the run, each answered by one command."""
