"""Official checkpoints in, diffusers models out."""

from davae.convert.diffusion_transformers import dit, lightningdit, sit
from davae.convert.ldm_autoencoder import vavae
from davae.convert.official_davae import official_davae

__all__ = ["dit", "lightningdit", "official_davae", "sit", "vavae"]
