"""Official checkpoints in, diffusers models out."""
