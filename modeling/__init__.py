"""Denoising diffusion probabilistic models: schedule, network, loss, samplers, training and evaluation."""
