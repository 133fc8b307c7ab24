"""The models of the coverage sweep: name -> (model, sample). Random weights, no downloads, small inputs."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

Factory = Callable[[], tuple[nn.Module, Any]]

SIZES = {  # smallest inputs that the architectures take
    r"inception": 128, r"googlenet": 64, r"vit_h_14": 224, r"vit_": 224, r"swin": 128, r"maxvit": 224, r"alexnet": 96,
    r"squeezenet": 96,
}  # fmt: skip


def _size(name: str) -> int:
    return next((size for pattern, size in SIZES.items() if re.search(pattern, name)), 64)


def torchvision_kinds() -> dict[str, str]:
    """All models of torchvision and what they are for."""
    from torchvision import models

    kinds = dict.fromkeys(models.list_models(module=models), "classification")
    for kind in ("segmentation", "video", "optical_flow", "detection", "quantization"):
        kinds |= dict.fromkeys(models.list_models(module=getattr(models, kind)), kind)
    return kinds


def torchvision_models() -> dict[str, Factory]:
    """Classification, segmentation, video, optical flow and detection of torchvision."""
    return {name: lambda name=name, kind=kind: _torchvision(name, kind) for name, kind in torchvision_kinds().items()}


def _torchvision(name: str, kind: str) -> tuple[nn.Module, Any]:
    from torchvision import models

    options: dict[str, Any] = {"weights": None}
    if kind in ("segmentation", "detection"):
        options["weights_backbone"] = None
    if name in ("googlenet", "inception_v3"):
        options["init_weights"] = False
    if kind == "quantization":
        options["quantize"] = True
    model = models.get_model(name, **options)
    if kind == "detection":
        return model.backbone, torch.randn(
            2, 3, 320 if "320" in name or "ssd" in name else 128, 320 if "ssd" in name else 128
        )
    if kind == "optical_flow":
        return model, (torch.randn(1, 3, 128, 128), torch.randn(1, 3, 128, 128))
    if kind == "video":
        frames, size = (16, 224) if "mvit" in name else (14, 224) if name == "s3d" else (8, 64)
        return model, torch.randn(2, 3, frames, size, size)
    size = _size(name)
    return model, torch.randn(2, 3, size, size)


def timm_models() -> dict[str, Factory]:
    """One small model of every model module of timm."""
    import timm

    return {module: lambda module=module: _timm(module) for module in timm.list_modules()}


_SMALL = r"test|nano|atto|femto|pico|micro|tiny|xxs|xs|small|mini|_s\b|_0|0\b|b0|18|26|10|8|t\b"


def _timm(module: str) -> tuple[nn.Module, Any]:
    import timm

    names = timm.list_models(module=module) or sorted(timm.models._registry._module_to_models[module])
    likely = [name for name in names if re.search(_SMALL, name)] or names
    counted = []
    for name in likely[:12]:
        try:
            with torch.device("meta"):
                counted.append((sum(p.numel() for p in timm.create_model(name).parameters()), name))
        except Exception:
            counted.append((10**12, name))
    parameters, name = min(counted)
    settings = timm.get_pretrained_cfg(name)
    size = settings.input_size[-1]
    smaller = {} if size <= 256 or settings.fixed_input_size else {"img_size": 224}
    shallower = {} if parameters < 150e6 else {"depth": 4}
    for options in ({**smaller, **shallower}, smaller, {}):
        try:
            model = timm.create_model(name, **options)
            break
        except TypeError:  # not every model takes them
            continue
    size = 224 if smaller else size
    model.variant = name + "".join(f", {key}={value}" for key, value in options.items())
    return model, torch.randn(2, settings.input_size[0], size, size)


def _text() -> torch.Tensor:
    return torch.randint(1, 90, (2, 12))


_TEXT = {
    "vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
}  # fmt: skip
_IMAGE = {
    "image_size": 32, "patch_size": 8, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "intermediate_size": 48,
}  # fmt: skip
_SEQ = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
        "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}  # fmt: skip

TRANSFORMERS: dict[str, tuple[str, str, dict[str, Any], str]] = {  # name: config, model, settings, input
    "BERT": ("BertConfig", "BertForSequenceClassification", _TEXT, "text"),
    "RoBERTa": ("RobertaConfig", "RobertaForSequenceClassification", _TEXT, "text"),
    "DistilBERT": ("DistilBertConfig", "DistilBertForSequenceClassification",
                   {"vocab_size": 99, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48}, "text"),
    "ELECTRA": ("ElectraConfig", "ElectraForSequenceClassification", {**_TEXT, "embedding_size": 16}, "text"),
    "GPT-2": ("GPT2Config", "GPT2LMHeadModel", {"vocab_size": 99, "n_embd": 32, "n_layer": 2, "n_head": 4}, "text"),
    "GPT-NeoX": ("GPTNeoXConfig", "GPTNeoXForCausalLM", _TEXT, "text"),
    "Llama": ("LlamaConfig", "LlamaForCausalLM", {**_TEXT, "num_key_value_heads": 2}, "text"),
    "Qwen": ("Qwen2Config", "Qwen2ForCausalLM", {**_TEXT, "num_key_value_heads": 2}, "text"),
    "T5": ("T5Config", "T5ForConditionalGeneration",
           {"vocab_size": 99, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}, "pair"),
    "BART": ("BartConfig", "BartForConditionalGeneration", {**_SEQ, "vocab_size": 99, "max_position_embeddings": 64},
             "pair"),
    "ViT": ("ViTConfig", "ViTForImageClassification", _IMAGE, "image"),
    "DeiT": ("DeiTConfig", "DeiTForImageClassification", _IMAGE, "image"),
    "Swin": ("SwinConfig", "SwinForImageClassification",
             {"image_size": 32, "patch_size": 2, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4],
              "window_size": 4}, "image"),
    "ConvNeXt": ("ConvNextConfig", "ConvNextForImageClassification",
                 {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 2, 1]}, "image"),
    "CLIP": ("CLIPConfig", "CLIPModel",
             {"text_config": {**_TEXT, "max_position_embeddings": 32}, "vision_config": _IMAGE, "projection_dim": 16},
             "clip"),
    "Whisper": ("WhisperConfig", "WhisperForConditionalGeneration",
                {**_SEQ, "vocab_size": 99, "num_mel_bins": 8, "max_source_positions": 16, "pad_token_id": 0,
                 "decoder_start_token_id": 1, "bos_token_id": 1, "eos_token_id": 2}, "speech"),
    "Wav2Vec2": ("Wav2Vec2Config", "Wav2Vec2ForSequenceClassification",
                 {**_TEXT, "conv_dim": (16, 16), "conv_stride": (5, 2), "conv_kernel": (10, 3),
                  "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 4, "classifier_proj_size": 16,
                  "num_feat_extract_layers": 2}, "wave"),
    "SegFormer": ("SegformerConfig", "SegformerForSemanticSegmentation",
                  {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1], "num_attention_heads": [1, 2, 2, 4],
                   "decoder_hidden_size": 16}, "image64"),
    "Mamba": ("MambaConfig", "MambaForCausalLM", {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2,
                                                  "state_size": 4}, "text"),
}  # fmt: skip


def _hugging_face(name: str) -> tuple[nn.Module, Any]:
    transformers = importlib.import_module("transformers")
    config, model, settings, kind = TRANSFORMERS[name]
    built = getattr(transformers, config)(**settings)
    for part in (built, getattr(built, "text_config", None), getattr(built, "vision_config", None)):
        if part is not None and hasattr(part, "use_cache"):
            part.use_cache = False
    samples: dict[str, Callable[[], Any]] = {
        "text": lambda: {"input_ids": _text()},
        "pair": lambda: {"input_ids": _text(), "decoder_input_ids": _text()},
        "image": lambda: {"pixel_values": torch.randn(2, 3, 32, 32)},
        "image64": lambda: {"pixel_values": torch.randn(2, 3, 64, 64)},
        "clip": lambda: {"input_ids": _text(), "pixel_values": torch.randn(2, 3, 32, 32)},
        "speech": lambda: {"input_features": torch.randn(2, 8, 32), "decoder_input_ids": _text()},
        "wave": lambda: {"input_values": torch.randn(2, 400)},
    }
    return getattr(transformers, model)(built), samples[kind]()


def home_made_models() -> dict[str, Factory]:
    """The zoo of the tests."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    return dict(importlib.import_module("models.zoo").ZOO)


ZOOS: dict[str, Callable[[], dict[str, Factory]]] = {
    "torchvision": torchvision_models,
    "timm": timm_models,
    "transformers": lambda: {name: lambda name=name: _hugging_face(name) for name in TRANSFORMERS},
    "home-made": home_made_models,
}
