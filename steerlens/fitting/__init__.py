"""Fits of the vectors that some methods steer along, from examples; each returns a `VectorFile` to save."""

from __future__ import annotations

from steerlens.fitting.anchors import anchor_reweighting
from steerlens.fitting.baking import bake, output_bias
from steerlens.fitting.channels import positional_channels
from steerlens.fitting.focus import focus_directions
from steerlens.fitting.focusicl import focusicl
from steerlens.fitting.keys import seka
from steerlens.fitting.lookback import lookback_lens
from steerlens.fitting.probes import iti, nl_iti

__all__ = [
    "anchor_reweighting",
    "bake",
    "focus_directions",
    "focusicl",
    "iti",
    "lookback_lens",
    "nl_iti",
    "output_bias",
    "positional_channels",
    "seka",
]
