"""Fits of what some methods steer by, from examples; most return a `VectorFile` to save."""

from __future__ import annotations

from steerlens.fitting.anchors import anchor_reweighting
from steerlens.fitting.baking import bake, output_bias
from steerlens.fitting.channels import positional_channels
from steerlens.fitting.focus import focus_directions
from steerlens.fitting.focusicl import focusicl
from steerlens.fitting.keys import adaseka, seka
from steerlens.fitting.lookback import lookback_lens
from steerlens.fitting.massive import massive_activations
from steerlens.fitting.probes import iti, nl_iti

__all__ = [
    "adaseka",
    "anchor_reweighting",
    "bake",
    "focus_directions",
    "focusicl",
    "iti",
    "lookback_lens",
    "massive_activations",
    "nl_iti",
    "output_bias",
    "positional_channels",
    "seka",
]
