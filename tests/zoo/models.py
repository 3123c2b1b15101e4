# SPDX-License-Identifier: Apache-2.0
"""A few lines round models of other packages and of plain torch, with random weights: (module, example inputs)."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

Inputs = Mapping[str, Tensor]
ZOO: dict[str, Callable[..., tuple[nn.Module, Inputs]]] = {}
# Sizes of released models; without them an entry is small. They are SigLIP so400m at 384 pixels, BLIP-2's Q-Former, and
# DETR ResNet-50 with a picture of 800 × 1,066 pixels.
RELEASED: dict[str, dict[str, int]] = {
    "siglip_head": {"width": 1152, "heads": 16, "hidden": 4304, "tokens": 729},
    "blip2_qformer": {
        "width": 768, "layers": 12, "heads": 12, "seen": 1408, "every": 2, "queries": 32, "tokens": 257,
    },
    "detr_decoder": {"width": 256, "layers": 6, "heads": 8, "hidden": 2048, "queries": 100, "tokens": 850},
}  # fmt: skip


def entry(make: Callable[..., tuple[nn.Module, Inputs]]) -> Callable[..., tuple[nn.Module, Inputs]]:
    ZOO[make.__name__] = make
    return make


def shaken(module: nn.Module) -> nn.Module:
    """Away from weights that start as zeros and ones, which would hide what a fold gets wrong."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return module.eval()


def transformers(model: str, name: str, config: str, *arguments: Any, **sizes: Any) -> nn.Module:
    """A class of transformers with a config of these sizes."""
    torch.manual_seed(0)
    code = importlib.import_module(f"transformers.models.{model}.modeling_{model}")
    configs = importlib.import_module(f"transformers.models.{model}.configuration_{model}")
    settings = getattr(configs, config)(**sizes)
    settings._attn_implementation = "eager"
    return shaken(getattr(code, name)(settings, *arguments))


class Take(nn.Module):
    """One tensor of what a model returns."""

    def __init__(self, model: nn.Module, name: str | int, **fixed: Any) -> None:
        super().__init__()
        self.model, self.name, self.fixed = model, name, fixed

    def forward(self, **inputs: Tensor) -> Tensor:
        found = self.model(**inputs, **self.fixed)
        taken: Tensor = found[self.name]
        return taken


@entry
def idefics_resampler() -> tuple[nn.Module, Inputs]:
    model = transformers(
        "idefics", "IdeficsPerceiverResampler", "IdeficsConfig", 64, 2, 2, 32, 16, vision_config={"embed_dim": 64}
    )
    return model, {"context": torch.randn(1, 1024, 64)}


@entry
def idefics2_resampler() -> tuple[nn.Module, Inputs]:
    sizes = {"hidden_size": 64, "resampler_n_latents": 16, "resampler_depth": 2, "resampler_n_heads": 4}
    more = {"resampler_head_dim": 16, "num_key_value_heads": 2}
    model = transformers("idefics2", "Idefics2PerceiverResampler", "Idefics2PerceiverConfig", **sizes, **more)
    return model, {"context": torch.randn(1, 1024, 64), "attention_mask": torch.ones(1, 1024, dtype=torch.int64)}


@entry
def siglip_head(width: int = 128, heads: int = 4, hidden: int = 256, tokens: int = 1024) -> tuple[nn.Module, Inputs]:
    sizes = {"hidden_size": width, "num_attention_heads": heads, "intermediate_size": hidden}
    model = transformers("siglip", "SiglipMultiheadAttentionPoolingHead", "SiglipVisionConfig", **sizes)
    return model, {"hidden_state": torch.randn(1, tokens, width)}


@entry
def aimv2_head() -> tuple[nn.Module, Inputs]:
    sizes = {"hidden_size": 128, "num_attention_heads": 4, "intermediate_size": 256}
    return transformers("aimv2", "Aimv2AttentionPoolingHead", "Aimv2VisionConfig", **sizes), {
        "hidden_states": torch.randn(1, 1024, 128)
    }


@entry
def blip2_qformer(
    width: int = 64,
    layers: int = 2,
    heads: int = 4,
    seen: int = 96,
    every: int = 1,
    queries: int = 16,
    tokens: int = 256,
) -> tuple[nn.Module, Inputs]:
    """Every so many layers the queries read tokens of the width ``seen``."""
    sizes = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads}
    more = {"intermediate_size": (4 if layers > 2 else 2) * width, "encoder_hidden_size": seen}
    model = transformers(
        "blip_2", "Blip2QFormerModel", "Blip2QFormerConfig", **sizes, **more, cross_attention_frequency=every
    )
    inputs = {"query_embeds": torch.randn(1, queries, width), "encoder_hidden_states": torch.randn(1, tokens, seen)}
    return Take(model, "last_hidden_state"), inputs


@entry
def edgetam_perceiver() -> tuple[nn.Module, Inputs]:
    sizes = {
        "perceiver_resampler_hidden_size": 64,
        "perceiver_resampler_num_latents": 16,
        "perceiver_resampler_num_latents_2d": 16,
        "perceiver_resampler_num_layers": 2,
        "perceiver_resampler_attention_head_dim": 64,
    }
    model = transformers("edgetam_video", "EdgeTamVideoPerceiverResampler", "EdgeTamVideoConfig", **sizes)
    return Take(model, 0), {"hidden_states": torch.randn(1, 64, 32, 32)}


@entry
def aria_projector() -> tuple[nn.Module, Inputs]:
    vision = {"hidden_size": 64, "num_attention_heads": 4}
    text = {"model_type": "aria_text", "hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 4}
    sizes = {"vision_config": vision, "text_config": text, "projector_patch_to_query_dict": {576: 16}}
    return transformers("aria", "AriaProjector", "AriaConfig", **sizes), {"key_value_states": torch.randn(1, 576, 64)}


@entry
def kosmos2_projection() -> tuple[nn.Module, Inputs]:
    sizes = {
        "vision_config": {"hidden_size": 48},
        "text_config": {"embed_dim": 64, "attention_heads": 4},
        "latent_query_num": 16,
    }
    model = transformers("kosmos2", "Kosmos2ImageToTextProjection", "Kosmos2Config", **sizes)
    return Take(model, 0), {"features": torch.randn(1, 257, 48)}


@entry
def detr_decoder(
    width: int = 64, layers: int = 2, heads: int = 4, hidden: int = 128, queries: int = 20, tokens: int = 400
) -> tuple[nn.Module, Inputs]:
    """Object queries are constants: the whole first self-attention is one."""

    class Decoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            sizes = {"d_model": width, "decoder_layers": layers, "decoder_attention_heads": heads}
            self.decoder = transformers("detr", "DetrDecoder", "DetrConfig", **sizes, decoder_ffn_dim=hidden)
            self.queries = nn.Parameter(torch.randn(1, queries, width))

        def forward(self, features: Tensor, positions: Tensor) -> Tensor:
            queries = self.queries.expand(features.shape[0], -1, -1)
            found: Tensor = self.decoder(
                inputs_embeds=torch.zeros_like(queries),
                encoder_hidden_states=features,
                spatial_position_embeddings=positions,
                object_queries_position_embeddings=queries,
            ).last_hidden_state
            return found

    return Decoder().eval(), {name: torch.randn(1, tokens, width) for name in ("features", "positions")}


@entry
def sam_two_way() -> tuple[nn.Module, Inputs]:
    sizes = {"hidden_size": 64, "num_attention_heads": 2, "mlp_dim": 128, "num_hidden_layers": 2}
    model = transformers("sam", "SamTwoWayTransformer", "SamMaskDecoderConfig", **sizes)
    inputs = {
        "point_embeddings": torch.randn(1, 1, 7, 64),
        "image_embeddings": torch.randn(1, 64, 16, 16),
        "image_positional_embeddings": torch.randn(1, 64, 16, 16),
    }
    return Take(model, 0, attention_similarity=None), inputs


PERCEIVER = {"num_latents": 32, "d_latents": 64, "num_blocks": 2, "num_self_attends_per_block": 1, "num_labels": 10}
HEADS = {"num_self_attention_heads": 4, "num_cross_attention_heads": 1}


def perceiver(name: str, **sizes: Any) -> nn.Module:
    return Take(transformers("perceiver", name, "PerceiverConfig", **PERCEIVER, **HEADS, **sizes), "logits")


@entry
def perceiver_fourier() -> tuple[nn.Module, Inputs]:
    """Its image size is in the class."""
    return perceiver("PerceiverForImageClassificationFourier", d_model=261), {"inputs": torch.randn(1, 3, 224, 224)}


@entry
def perceiver_learned() -> tuple[nn.Module, Inputs]:
    model = perceiver("PerceiverForImageClassificationLearned", d_model=512, image_size=32)
    return model, {"inputs": torch.randn(1, 3, 32, 32)}


@entry
def perceiver_flow() -> tuple[nn.Module, Inputs]:
    model = perceiver("PerceiverForOpticalFlow", d_model=322, train_size=[32, 48])
    return model, {"inputs": torch.randn(1, 2, 27, 32, 48)}


@entry
def perceiver_language() -> tuple[nn.Module, Inputs]:
    model = perceiver("PerceiverForMaskedLM", d_model=64, vocab_size=262, max_position_embeddings=256)
    return model, {"inputs": torch.randint(0, 262, (1, 256))}


@entry
def lucidrains_perceiver() -> tuple[nn.Module, Inputs]:
    from perceiver_pytorch import Perceiver

    torch.manual_seed(0)
    sizes = {"num_latents": 32, "latent_dim": 64, "cross_heads": 1, "latent_heads": 4, "num_classes": 10, "depth": 2}
    model = Perceiver(input_channels=3, input_axis=2, num_freq_bands=6, max_freq=10.0, **sizes)
    return shaken(model), {"data": torch.randn(1, 48, 48, 3)}


@entry
def lucidrains_perceiver_io() -> tuple[nn.Module, Inputs]:
    from perceiver_pytorch import PerceiverIO

    torch.manual_seed(0)
    sizes = {"num_latents": 32, "latent_dim": 64, "cross_heads": 1, "latent_heads": 4, "logits_dim": 10, "depth": 2}
    model = PerceiverIO(dim=32, queries_dim=32, **sizes)
    return shaken(model), {"data": torch.randn(1, 2048, 32), "queries": torch.randn(1, 1024, 32)}


@entry
def transformer_decoder() -> tuple[nn.Module, Inputs]:
    """torch's own decoder, whose 16 queries read 2,048 tokens."""

    class Reader(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            layer = nn.TransformerDecoderLayer(64, 1, 128, batch_first=True, norm_first=True)
            self.queries, self.decoder = nn.Parameter(torch.randn(1, 16, 64)), nn.TransformerDecoder(layer, 2)

        def forward(self, tokens: Tensor) -> Tensor:
            found: Tensor = self.decoder(self.queries.expand(tokens.shape[0], -1, -1), tokens)
            return found

    torch.manual_seed(0)
    return shaken(Reader()), {"tokens": torch.randn(1, 2048, 64)}


@entry
def attention_pooling() -> tuple[nn.Module, Inputs]:
    """One trained query and nn.MultiheadAttention, rows before samples."""

    class Pool(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.query, self.attention = nn.Parameter(torch.randn(1, 1, 64)), nn.MultiheadAttention(64, 4)
            self.norm, self.head = nn.LayerNorm(64), nn.Linear(64, 10)

        def forward(self, tokens: Tensor) -> Tensor:
            x = self.norm(tokens).transpose(0, 1)
            read, _ = self.attention(self.query.expand(1, tokens.shape[0], -1), x, x, need_weights=False)
            found: Tensor = self.head(read[0])
            return found

    torch.manual_seed(0)
    return shaken(Pool()), {"tokens": torch.randn(2, 512, 64)}


@entry
def shape_autoencoder() -> tuple[nn.Module, Inputs]:
    """Points read by latents, and values at query points read from these (3DShape2VecSet)."""

    class Shapes(nn.Module):
        def __init__(self, width: int = 64) -> None:
            super().__init__()
            self.points, self.latents = nn.Linear(48, width), nn.Parameter(torch.randn(32, width))
            self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3))
            self.reads = nn.ModuleList(nn.MultiheadAttention(width, 1, batch_first=True) for _ in range(3))
            self.value = nn.Linear(width, 1)

        def embedded(self, points: Tensor) -> Tensor:
            bands = points.unsqueeze(-1) * 2.0 ** torch.arange(8)
            found: Tensor = self.points(torch.cat([bands.sin(), bands.cos()], -1).flatten(2))
            return found

        def forward(self, points: Tensor, queries: Tensor) -> Tensor:
            x = self.norms[0](self.embedded(points))
            z = self.latents.expand(points.shape[0], -1, -1)
            z = z + self.reads[0](self.norms[1](z), x, x, need_weights=False)[0]
            z = z + self.reads[1](z, z, z, need_weights=False)[0]
            asked = self.norms[2](self.embedded(queries))
            found: Tensor = self.value(self.reads[2](asked, z, z, need_weights=False)[0])
            return found

    torch.manual_seed(0)
    return shaken(Shapes()), {"points": torch.rand(1, 1024, 3), "queries": torch.rand(1, 2048, 3)}
