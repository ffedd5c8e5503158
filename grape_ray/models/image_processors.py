"""Image processors of Hugging Face models: what makes pixels of an image as the model learned
them.
"""

from __future__ import annotations

import hashlib
import json
from functools import lru_cache
from typing import Any

import transformers

from grape_ray.models.extras import needed
from grape_ray.models.from_scratch import is_scratch, scratch_image_processor
from grape_ray.models.hugging_face import load_with

# Two sizes of images, by which it is seen whether a processor makes one of all.
_PROBES = ((37, 53), (80, 44))


@lru_cache(maxsize=4)
def image_processor_of(name: str) -> Any:
    """The image processor of a hub name or folder, on torchvision where that is installed and on
    pillow otherwise; each is loaded once a process.

    Raises:
        ConfigError: there is none, or pillow is not installed.
    """
    needed("PIL", "an image processor", "images")

    def build(place: str) -> Any:
        if is_scratch(name):
            return scratch_image_processor(name)
        return transformers.AutoImageProcessor.from_pretrained(place, trust_remote_code=False)

    return load_with(name, build)


def processor_fingerprint(processor: Any) -> str:
    """What changes when a processor reads an image differently."""
    said = json.dumps(processor.to_dict(), sort_keys=True, default=str)
    return hashlib.sha256(said.encode()).hexdigest()[:32]


def output_size(processor: Any) -> tuple[int, int] | None:
    """Height and width of what a processor makes of any image; None where they depend on the
    image's.
    """
    from PIL import Image

    made = [
        tuple(processor(images=[Image.new("RGB", size)], return_tensors="np")["pixel_values"].shape)
        for size in _PROBES
    ]
    return made[0][-2:] if made[0] == made[1] else None
