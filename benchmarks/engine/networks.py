"""The networks that the engines are timed on, with random weights and data of a fixed seed."""

from __future__ import annotations

import torch


class ResidualBlock(torch.nn.Module):
    """Two 3x3 convolutions with batch norm, and a 1x1 convolution beside them where needed.

    Args:
        n_in:
            Channels in.
        n_out:
            Channels out.
        stride:
            Of the first convolution. One by default.
    """

    def __init__(self, n_in: int, n_out: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = torch.nn.Conv2d(n_in, n_out, 3, stride, 1, bias=False)
        self.bn1 = torch.nn.BatchNorm2d(n_out)
        self.conv2 = torch.nn.Conv2d(n_out, n_out, 3, 1, 1, bias=False)
        self.bn2 = torch.nn.BatchNorm2d(n_out)
        self.skip: torch.nn.Module = torch.nn.Identity()
        if stride != 1 or n_in != n_out:
            self.skip = torch.nn.Sequential(
                torch.nn.Conv2d(n_in, n_out, 1, stride, bias=False), torch.nn.BatchNorm2d(n_out)
            )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the block's outputs."""
        hidden = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(hidden)) + self.skip(x))


def residual_network(n_classes: int = 10, width: float = 1.0) -> torch.nn.Module:
    """A residual network for images of 3x32x32, of 308,650 weights by default.

    Args:
        n_classes:
            C. Ten by default.
        width:
            By what the channels are multiplied, the weights with its square. One by default.
    """
    small, middle, large = (round(width * n) for n in (32, 64, 128))
    return torch.nn.Sequential(
        torch.nn.Conv2d(3, small, 3, 1, 1, bias=False),
        torch.nn.BatchNorm2d(small),
        torch.nn.ReLU(),
        ResidualBlock(small, small),
        ResidualBlock(small, middle, 2),
        ResidualBlock(middle, large, 2),
        torch.nn.AdaptiveAvgPool2d(1),
        torch.nn.Flatten(),
        torch.nn.Linear(large, n_classes),
    )


def resnet18(n_classes: int = 10) -> torch.nn.Module:
    """ResNet-18 with the stem for images of 3x32x32 (He et al., 2016): 11.17 million weights."""
    layers: list[torch.nn.Module] = [
        torch.nn.Conv2d(3, 64, 3, 1, 1, bias=False),
        torch.nn.BatchNorm2d(64),
        torch.nn.ReLU(),
    ]
    width = 64
    for n_out, stride in ((64, 1), (128, 2), (256, 2), (512, 2)):
        layers += [ResidualBlock(width, n_out, stride), ResidualBlock(n_out, n_out)]
        width = n_out
    head = [
        torch.nn.AdaptiveAvgPool2d(1),
        torch.nn.Flatten(),
        torch.nn.Linear(width, n_classes),
    ]
    return torch.nn.Sequential(*layers, *head)


def flat_network(n_classes: int = 10) -> torch.nn.Module:
    """A perceptron of 197,258 weights, whose kernel on white noise decays slowly."""
    return torch.nn.Sequential(
        torch.nn.Flatten(),
        torch.nn.Linear(3 * 32 * 32, 64),
        torch.nn.Tanh(),
        torch.nn.Linear(64, n_classes),
    )


def with_statistics(model: torch.nn.Module, images: torch.Tensor) -> torch.nn.Module:
    """Return the model in evaluation mode with batch-norm statistics of these images."""
    with torch.no_grad():
        model.train()
        for _ in range(3):
            model(images)
    return model.eval()


def problem(
    name: str, n_samples: int, n_classes: int = 10, seed: int = 0, *, width: float = 1.0
) -> tuple[torch.nn.Module, torch.Tensor, torch.Tensor]:
    """Return a network, inputs with one sample a row, and labels.

    Args:
        name:
            ``"residual"``, ``"resnet18"`` or ``"flat"``, whose images are white noise;
            ``"efficientnet"`` for EfficientNet-Lite0 on digits of 64 pixels, or ``"minilm"`` for
            the sentence encoder on short texts, both pretrained, with as many samples of each
            class.
        n_samples:
            N.
        n_classes:
            C. Ten by default.
        seed:
            Of weights and data.
        width:
            Of the residual network. One by default.
    """
    if name in ("efficientnet", "minilm"):
        return _pretrained(name, n_samples // n_classes, n_classes, seed)
    torch.manual_seed(seed)
    makers = {"resnet18": resnet18, "flat": flat_network}
    model = residual_network(n_classes, width) if name == "residual" else makers[name](n_classes)
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n_samples) % n_classes
    patterns = torch.randn(n_classes, 3, 8, 8, generator=generator)
    coarse = torch.nn.functional.interpolate(patterns, scale_factor=4.0, mode="bilinear")
    signal = 0.0 if name == "flat" else coarse[labels]
    images = signal + torch.randn(n_samples, 3, 32, 32, generator=generator)
    return with_statistics(model, images[:64]), images, labels


def _pretrained(
    name: str, per_class: int, n_classes: int, seed: int
) -> tuple[torch.nn.Module, torch.Tensor, torch.Tensor]:
    # These need packages that the others do without.
    from benchmarks.accuracy import tasks

    if name == "minilm":
        tuning = tasks.minilm(name, seed, n_classes=n_classes, per_class=per_class)
    else:
        tuning = tasks.efficientnet(
            name, *tasks.digits(), seed, n_classes=n_classes, per_class=per_class
        )
    return tuning.model, tuning.inputs, tuning.labels
