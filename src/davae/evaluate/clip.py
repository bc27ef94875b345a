"""CLIP score of images and their prompts, and colours of crops by classification."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from davae.pretrained.placement import own_device
from davae.pretrained.processors import load_processor
from davae.pretrained.stored import load_component


class Clip:
    """A CLIP model of transformers, from a folder or hub id.

    Raises:
        ModelError: there is none, it needs code of its folder, or its weights are pickled, damaged or of another model.
    """

    def __init__(self, model: str):
        from transformers import CLIPModel, CLIPProcessor

        what = f"CLIP model {model}"
        self.model: Any = load_component(model, "", CLIPModel, torch.float32, what)
        self.processor: Any = load_processor(model, CLIPProcessor, what)
        self.device = own_device()
        self.model.to(self.device)

    @torch.no_grad()
    def embed(self, images: list[Image.Image], texts: list[str]) -> tuple[Tensor, Tensor]:
        """Return embeddings of length one, (images,d) and (texts,d)."""
        inputs = self.processor(text=texts, images=images, return_tensors="pt", padding=True, truncation=True)
        output = self.model(**inputs.to(self.device))
        return output.image_embeds, output.text_embeds

    def similarity(self, images: list[Image.Image], texts: list[str]) -> Tensor:
        """Return the cosines (images, texts)."""
        seen, read = self.embed(images, texts)
        return (seen @ read.T).cpu()

    def score(self, images: list[Image.Image], texts: list[str]) -> Tensor:
        """Return the CLIP score (N,) of each image with its own text: 100 max(cosine, 0)."""
        return 100 * self.similarity(images, texts).diagonal().clamp(min=0)

    def colour(self, crop: Image.Image, thing: str, colours: tuple[str, ...]) -> str:
        """Return the colour of a crop by zero-shot classification.

        A colour's embedding is the mean of three templates, normalised to length one.

        Args:
            crop: the image of one thing.
            thing: its name.
            colours: names to choose from.
        """
        templates = ("a photo of a {} " + thing, "a photo of a {}-colored " + thing, "a photo of a {} object")
        texts = [template.format(colour) for colour in colours for template in templates]
        image, words = self.embed([crop], texts)
        by_colour = words.unflatten(0, (len(colours), len(templates))).mean(1)  # (colours,d)
        return colours[int((F.normalize(by_colour, dim=1) @ image[0]).argmax())]
