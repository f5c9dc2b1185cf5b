"""Text-to-image latent diffusion: an experiment framework."""
