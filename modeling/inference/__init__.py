"""What training and evaluation both ask of a model: a device, images, samples, and the loss on held-out images."""
