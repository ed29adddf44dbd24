"""Times steered against unsteered attention: prefill and decode, per backend and method, with peers.

Every pair of timings is taken next to each other in one process, so that a machine that others use too slows
both sides alike; a row reports the median of the pairs' ratios and their spread. A row whose result differs
from the definition is not timed at all.
"""

from steerlens.bench.run import bench, over_budget, over_memory
from steerlens.bench.settings import PRESETS, Settings

__all__ = ["PRESETS", "Settings", "bench", "over_budget", "over_memory"]
