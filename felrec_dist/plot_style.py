"""How every plot looks, in reports and in studies."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# Okabe and Ito's, which colour-blind people tell apart, without the yellow, which is hard to see on
# white. Lines differ in their markers, too, for print.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "osD^vP*X"

RC_PARAMS: Mapping[str, Any] = {
    # Text stays text, so that it can be searched and read aloud.
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 10.0,
    "axes.titlesize": 10.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.6,
    "lines.markersize": 4.5,
    "legend.frameon": False,
    "legend.fontsize": 9.0,
}
