"""A task: fine-tune a Hugging Face image classifier on a folder of images, or a column of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from grape_ray.data.arrays import Ragged, Records
from grape_ray.data.columns import Table
from grape_ray.data.prepared import Columns
from grape_ray.errors import ConfigError
from grape_ray.models.hugging_face import load_classifier
from grape_ray.models.image_processors import image_processor_of, output_size, processor_fingerprint
from grape_ray.storage import Json
from grape_ray.tasks.images import check_images, decoded, random_views, size_of
from grape_ray.tasks.labels import LabelledTask


@dataclass(frozen=True)
class ImageClassification(LabelledTask):
    """Images are kept encoded, as their files are, and become pixels batch by batch, by the model's
    own image processor; the other fields are those of LabelledTask.

    Attributes:
        image_column: name of the column of encoded images; of a folder of images it is `image`.
        views: K random views of each image a step, whose gradients are averaged before they are
            clipped (augmentation multiplicity, De et al. 2022); 1 trains on images as they are.
            Evaluation sees each image as it is.
        crop_padding: of a view, the share of a side that is added (reflected) at either end before
            a piece of the first size is cut out; 0 cuts nothing.
        flip: whether half of the views are mirrored, left to right.
        dropout: whether the model's dropout is on in training.
    """

    image_column: str = "image"
    views: int = 1
    crop_padding: float = 0.125
    flip: bool = True
    dropout: bool = False
    name: str = "image-classification"

    def check_fields(self) -> None:
        super().check_fields()
        self.check_at_least(views=1)
        if not 0 <= self.crop_padding < 0.5:
            expected = "a fraction from 0 to below 0.5"
            raise ConfigError("task.crop_padding", self.crop_padding, expected)

    @property
    def columns(self) -> Columns:
        return Columns((self.image_column, self.label_column), labels=self.unlabelled)

    @property
    def input_columns(self) -> Columns:
        """The columns that `predict` reads."""
        return Columns((self.image_column,))

    def reader(self) -> str:
        return processor_fingerprint(image_processor_of(self.model))

    def facts(self, train: Table, names: Callable[[str], Sequence[str]]) -> Json:
        """The labels' names, and the images' size where the processor leaves it as it is."""
        size = None
        if output_size(image_processor_of(self.model)) is None:
            found = size_of(train.slice(0, 1).binary(self.image_column)[0])
            size = list(found) if found else None  # refused by `check`
        return {**super().facts(train, names), "size": size}

    def check(self, table: Table, facts: Json) -> None:
        super().check(table, facts)
        size = facts["size"]
        check_images(table, self.image_column, (size[0], size[1]) if size else None)

    def encode(self, table: Table, facts: Json) -> Records:
        images = Ragged.of_bytes(table.binary(self.image_column))
        return Records({"image": images, **self.targets(table, facts)})

    def inputs(self, table: Table) -> dict[str, Ragged]:
        """The encoded images."""
        check_images(table, self.image_column, None)
        return {"image": Ragged.of_bytes(table.binary(self.image_column))}

    def build_model(self, seed: int) -> nn.Module:
        classes = len(self.label_names())
        model = load_classifier(
            self.model, classes, seed, self.dropout, "ImageClassification", self.weights
        )
        self._check_size(model)
        if self.multi_label:
            model.config.problem_type = "multi_label_classification"  # pyright: ignore
        self.name_labels(model)
        return self.prepared_model(model, seed)

    def collate(self, records: Records, indices: np.ndarray) -> Mapping[str, Tensor]:
        """Pixels (B * views, C, H, W), and the labels of each view."""
        files = records.sequences("image")
        images = decoded([files[index].tobytes() for index in indices])
        batch = image_processor_of(self.model)(images=images, return_tensors="pt")
        pixels = batch["pixel_values"]
        if self.views > 1:
            pixels = random_views(pixels, self.views, self.crop_padding, self.flip)
        found = {"pixel_values": pixels}
        if "labels" in records.columns:
            labels = torch.from_numpy(records.array("labels")[indices])
            found["labels"] = labels.repeat_interleave(self.views, 0)
        return found

    def logits(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        return model(pixel_values=self._typed(batch["pixel_values"])).logits

    def evaluate(self, model: nn.Module, records: Records) -> dict[str, float]:
        return LabelledTask.evaluate(self._plain(), model, records)

    def predict(self, model: nn.Module, records: Records) -> dict[str, list]:
        return LabelledTask.predict(self._plain(), model, records)

    def save(self, model: nn.Module, folder: Path) -> None:
        super().save(model, folder)
        image_processor_of(self.model).save_pretrained(folder)

    def _plain(self) -> ImageClassification:
        """The task on images as they are."""
        return self if self.views == 1 else dataclasses.replace(self, views=1)

    def _typed(self, pixels: Tensor) -> Tensor:
        """Pixels in the type of the weights, to which not every model brings them itself."""
        return pixels.to(torch.float32 if self.weights == "fp32" else torch.bfloat16)

    @torch.no_grad()
    def _check_size(self, model: nn.Module) -> None:
        """Refuses a model that does not take what its image processor makes, which no record can
        change. Raises ConfigError.
        """
        size = output_size(image_processor_of(self.model))
        if size is None:
            return
        try:
            model(pixel_values=self._typed(torch.zeros(2, 3, *size)))
        except (ValueError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:160]
            what = f"the image processor of task.model {self.model}"
            got = f"images of 3 x {size[0]} x {size[1]}"
            raise ConfigError(what, got, "what the model takes", reason) from error
