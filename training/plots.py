"""Reliability diagrams; needs matplotlib, which only training uses."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import matplotlib as mpl
import numpy as np
from numpy.typing import NDArray

mpl.use("Agg")
from matplotlib import pyplot as plt

BINS = np.linspace(0.0, 1.0, 11)


def draw(reliability: Mapping[str, tuple[NDArray[np.float64], NDArray[np.float64]]], folder: Path) -> None:
    """One picture with a panel per score: observed rate over predicted probability, sizes by rows per bin."""
    folder.mkdir(parents=True, exist_ok=True)
    columns = 4
    rows = -(-len(reliability) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(3 * columns, 3 * rows), squeeze=False)
    for axis in axes.flat[len(reliability) :]:
        axis.axis("off")
    for axis, (name, (predicted, observed)) in zip(axes.flat, reliability.items(), strict=False):
        place = np.minimum(np.digitize(predicted, BINS) - 1, 9)
        used = [b for b in range(10) if (place == b).any()]
        sizes = [8 + 200 * (place == b).mean() for b in used]
        axis.plot([0, 1], [0, 1], color="0.7", linewidth=1)
        axis.scatter([predicted[place == b].mean() for b in used], [observed[place == b].mean() for b in used], s=sizes)
        axis.set_title(name, fontsize=8)
        axis.set_xlabel("predicted", fontsize=7)
        axis.set_ylabel("observed", fontsize=7)
    figure.tight_layout()
    # Without metadata the file depends on nothing but the numbers.
    figure.savefig(folder / "calibration.png", dpi=80, metadata={"Software": None})
    plt.close(figure)
