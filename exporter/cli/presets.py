# SPDX-License-Identifier: Apache-2.0
"""`perceiver-export presets`."""

from __future__ import annotations

from perceiver_export.exporter.cli.output import JsonFlag, print_json, print_table


def presets(json: JsonFlag = False) -> None:
    """List the papers' architectures, which `export preset:NAME` builds with random weights to size a device."""
    from perceiver_export.exporter.presets import PRESETS

    if json:
        print_json(PRESETS)
        return
    rows = []
    for name, config in PRESETS.items():
        image, encoder = config.input, config.encoder
        layers = f"{encoder.num_blocks} × {encoder.num_self_attentions_per_block} shared"
        positions = image.positions.__struct_config__.tag
        rows.append(
            (
                f"preset:{name}",
                f"{image.num_channels} × {image.height} × {image.width}, {image.features}, {positions} positions",
                f"{encoder.num_latents} × {encoder.num_latent_channels}",
                layers,
                f"{config.decoder.num_output_channels} labels",
            )
        )
    print_table("architectures of the papers", ["source", "input", "latents", "self-attentions", "output"], rows)
