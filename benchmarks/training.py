"""The recipe of the benchmarks' networks, and their checkpoints.

Recipe: cross-entropy on the images of one task; SGD with momentum 0.9, Nesterov, weight decay 5e-4 and a one-cycle
learning rate for the convolutional networks, AdamW at 1e-3 for the transformer; random crop with padding 4 and
horizontal flip. The seed sets the initial weights, the order of the images and the augmentation.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from cifar_data import Images, normalise
from cifar_networks import NETWORKS
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm


@dataclass(frozen=True, eq=False)
class Trained:
    """A network in eval mode and the classes of its outputs: output i is class `classes[i]`."""

    network: nn.Module
    classes: tuple[int, ...]


@dataclass(frozen=True)
class Recipe:
    """What may be set differently from run to run.

    Attributes:
        rate: peak of the learning rate; None: the architecture's.
        decay: weight decay; None: the architecture's.
        crop: padding of the random crop; 0: none.
        flip: horizontal flip.
        smoothing: of the labels.
    """

    rate: float | None = None
    decay: float | None = None
    crop: int = 4
    flip: bool = True
    smoothing: float = 0.0


def augment(pixels: Tensor, generator: torch.Generator, padding: int = 4, flips: bool = True) -> Tensor:
    """Random crop and horizontal flip of a batch, each image by its own draw. Shape [n, c, h, w] → the same."""
    n, channels, height, width = pixels.shape
    padded = F.pad(pixels, (padding,) * 4)
    top = torch.randint(0, 2 * padding + 1, (n, 1, 1, 1), generator=generator).to(pixels.device)
    left = torch.randint(0, 2 * padding + 1, (n, 1, 1, 1), generator=generator).to(pixels.device)
    flip = torch.rand((n, 1, 1, 1), generator=generator).to(pixels.device) < (0.5 if flips else 0)
    rows = top + torch.arange(height, device=pixels.device).view(1, 1, -1, 1)
    columns = torch.arange(width, device=pixels.device).view(1, 1, 1, -1).expand(n, 1, 1, -1)
    columns = left + torch.where(flip, width - 1 - columns, columns)
    image = torch.arange(n, device=pixels.device).view(-1, 1, 1, 1)
    channel = torch.arange(channels, device=pixels.device).view(1, -1, 1, 1)
    return padded[image, channel, rows, columns]


def train_network(
    architecture: str,
    train: Images,
    classes: Sequence[int],
    *,
    width: float = 2,
    epochs: int = 40,
    batch_size: int = 128,
    seed: int = 0,
    device: str = "cpu",
    bfloat16: bool = False,
    recipe: Recipe = Recipe(),
    start: nn.Module | None = None,
    progress: bool | None = None,
) -> Trained:
    """Train one network on the images of `classes`. Deterministic for a seed on the CPU, RNG state aside.

    `bfloat16`: forward and backward passes in mixed precision; about twice as fast where the processor supports it.
    `start`: a network to go on from (a copy of it); None: a new one.
    """
    own = train.of(classes)
    lookup = torch.full((max(classes) + 1,), -1)
    lookup[torch.tensor(classes)] = torch.arange(len(classes))
    pixels, targets = own.pixels.to(device), lookup[own.labels].to(device)
    network = copy.deepcopy(start) if start is not None else _fresh(architecture, len(classes), width, seed)
    network = network.to(device, memory_format=torch.channels_last).train()
    generator = torch.Generator().manual_seed(seed)
    steps = epochs * -(-len(own) // batch_size)
    optimizer, peak = _optimizer(architecture, network, recipe)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, peak, total_steps=max(steps, 2), pct_start=0.2)
    shown = None if progress is None else not progress
    with tqdm(total=steps, desc=f"{architecture}, classes {','.join(map(str, classes))}", disable=shown) as bar:
        for _ in range(epochs):
            for index in torch.randperm(len(own), generator=generator).to(device).split(batch_size):
                images = normalise(augment(pixels[index], generator, recipe.crop, recipe.flip))
                images = images.contiguous(memory_format=torch.channels_last)
                with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=bfloat16):
                    logits = network(images)
                loss = F.cross_entropy(logits.float(), targets[index], label_smoothing=recipe.smoothing)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                nn.utils.clip_grad_norm_(network.parameters(), 5.0)
                optimizer.step()
                schedule.step()
                bar.update()
            bar.set_postfix(loss=f"{loss.item():.3f}")
    return Trained(network.eval(), tuple(classes))


def with_statistics_of(network: nn.Module, batches: Sequence[Tensor]) -> nn.Module:
    """A copy whose BatchNorms have the statistics of these batches."""
    result = copy.deepcopy(network)
    norms = [module for module in result.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
        norm.train()
    with torch.no_grad():
        for batch in batches:
            result(batch)
    return result.eval()


def save_checkpoint(trained: Trained, path: Path, architecture: str, width: float) -> None:
    """Weights as safetensors, with the architecture, the width and the classes as metadata."""
    path.parent.mkdir(parents=True, exist_ok=True)
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in trained.network.state_dict().items()}
    metadata = {"architecture": architecture, "width": f"{width:g}", "classes": ",".join(map(str, trained.classes))}
    save_file(weights, path, metadata=metadata)


def load_checkpoint(path: Path) -> Trained:
    """The network of a checkpoint; without a named architecture it is a ResNet-20."""
    with safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
        weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    if "classes" not in metadata:
        raise ValueError(f"A checkpoint must name its classes in the metadata `classes`; {path} does not.")
    classes = tuple(int(label) for label in metadata["classes"].split(","))
    build = NETWORKS[metadata.get("architecture", "resnet20")]
    network = build(len(classes), width=float(metadata.get("width", 1)))
    network.load_state_dict(weights)
    return Trained(network.eval(), classes)


def _fresh(architecture: str, classes: int, width: float, seed: int) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return NETWORKS[architecture](classes, width=width)


def _optimizer(architecture: str, network: nn.Module, recipe: Recipe) -> tuple[torch.optim.Optimizer, float]:
    """The optimizer and the peak of its learning rate."""

    def given(value: float | None, usual: float) -> float:
        return usual if value is None else value

    if architecture == "vit":
        return torch.optim.AdamW(network.parameters(), weight_decay=given(recipe.decay, 0.05)), given(recipe.rate, 1e-3)
    decay, rate = given(recipe.decay, 5e-4), given(recipe.rate, 0.2)
    return torch.optim.SGD(network.parameters(), lr=rate, momentum=0.9, weight_decay=decay, nesterov=True), rate
