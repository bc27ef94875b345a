"""Image preparation of ADM, which every published ImageNet figure uses: small images are enlarged, not left out."""

from __future__ import annotations

from PIL import Image


def adm_crop(image: Image.Image, width: int, height: int, place: tuple[float, float] = (0.5, 0.5)) -> Image.Image:
    """Resize an image until it just covers width x height, in ADM's steps, and cut the rest off.

    Source: `center_crop_arr` of guided-diffusion (github.com/openai/guided-diffusion, `image_datasets.py`; arXiv
    2105.05233). Halve with a box filter while both sides stay at least twice the target, resize with a bicubic filter to
    rounded sizes, crop. A square target at the default place gives ADM's pixels exactly.

    Args:
        image: RGB image of any size; smaller ones are enlarged.
        width, height: target, pixels.
        place: position of the crop, from 0 (left, top) over 0.5 (centre) to 1.

    Returns:
        The image, width x height.
    """
    while image.width >= 2 * width and image.height >= 2 * height:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = max(width / image.width, height / image.height)
    size = max(width, round(image.width * scale)), max(height, round(image.height * scale))
    image = image.resize(size, Image.Resampling.BICUBIC)
    left, top = int((size[0] - width) * place[0]), int((size[1] - height) * place[1])
    return image.crop((left, top, left + width, top + height))
