"""Official checkpoints in, diffusers models out."""

from davae.convert.diffusion_transformers import dit, lightningdit, sit
from davae.convert.ldm_autoencoder import vavae
from davae.convert.official_davae import official_davae
from davae.convert.tiny_autoencoder import tiny_autoencoder

__all__ = ["dit", "lightningdit", "official_davae", "sit", "tiny_autoencoder", "vavae"]
