"""The stages of the pipeline, one module each, with one function: run(config, out)."""
