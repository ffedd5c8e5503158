"""A small convolutional network for images of some 28 to 32 pixels: two convolutions and two linear
layers, the network that private training is compared on since Papernot et al. 2021 (arXiv
2007.14191, table 1), with rectifiers instead of hyperbolic tangents.

It is a model of transformers like any other: `scratch:conv_net` begins at random weights, and after
`register()` the Auto classes load it again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForImageClassification,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import ImageClassifierOutput


class ConvNetConfig(PreTrainedConfig):
    """Sizes of the network.

    Args:
        image_size: height and width, at least 14. num_channels: of an image. filters: of the first
            and the second convolution. hidden_size: of the linear layer before the classifier.
    """

    model_type = "conv_net"

    def __init__(
        self,
        image_size: int = 28,
        num_channels: int = 3,
        filters: Sequence[int] = (16, 32),
        hidden_size: int = 32,
        **others: Any,
    ) -> None:
        self.image_size, self.num_channels = image_size, num_channels
        self.filters, self.hidden_size = list(filters), hidden_size
        super().__init__(**others)


class ConvNetForImageClassification(PreTrainedModel):
    """Logits (B, labels) of pixels (B, channels, size, size)."""

    config_class = ConvNetConfig
    base_model_prefix = "features"
    main_input_name = "pixel_values"

    def __init__(self, config: ConvNetConfig) -> None:
        super().__init__(config)
        first, second = config.filters
        # each pooling takes one row and column away, each convolution about half of them
        middle = (config.image_size + 6 - 8) // 2 + 1 - 1
        side = (middle - 4) // 2 + 1 - 1
        self.features = nn.Sequential(
            nn.Conv2d(config.num_channels, first, 8, stride=2, padding=3),
            nn.ReLU(),
            nn.MaxPool2d(2, 1),
            nn.Conv2d(first, second, 4, stride=2),
            nn.ReLU(),
            nn.MaxPool2d(2, 1),
            nn.Flatten(),
            nn.Linear(second * side * side, config.hidden_size),
            nn.ReLU(),
        )
        labels: Any = config.num_labels
        self.classifier = nn.Linear(config.hidden_size, labels)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """PyTorch's own draw, which suits rectifiers."""
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.reset_parameters()

    def forward(self, pixel_values: Tensor) -> ImageClassifierOutput:
        return ImageClassifierOutput(logits=self.classifier(self.features(pixel_values)))  # pyright: ignore


def register() -> None:
    """Tells the Auto classes of transformers of the family."""
    AutoConfig.register(ConvNetConfig.model_type, ConvNetConfig, exist_ok=True)
    AutoModelForImageClassification.register(
        ConvNetConfig, ConvNetForImageClassification, exist_ok=True
    )
