"""Training of sparse autoencoders on image and text tokens, as a plugin to SAE-Lens."""
