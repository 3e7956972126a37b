"""Pictures of results."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from sklearn.manifold import TSNE

from modafill.files import replacing

COLOURS = ("#3b6fb6", "#4f9d4c", "#d9a520", "#a0559b", "#c1533f", "#5aa5a5")


def embedding_figure(
    path: Path,
    real: np.ndarray,
    generated: dict[str, np.ndarray],
    modalities: list[str],
    *,
    n_points: int = 600,
    seed: int = 0,
) -> None:
    """Real and generated embeddings side by side in one t-SNE plane (ADMC Fig. 3), written as an image to ``path``.

    Args:
        real: ``[N, M, D]``.
        generated: title → ``[N, M, D]``, each modality generated from all the others.
        modalities: M names.
        n_points: samples drawn per panel.
        seed: of the draw and of t-SNE.
    """
    rows = np.random.default_rng(seed).permutation(len(real))[:n_points]
    panels = {"real": real[rows], **{title: tokens[rows] for title, tokens in generated.items()}}
    flat = np.concatenate([tokens.reshape(-1, tokens.shape[-1]) for tokens in panels.values()])
    plane = TSNE(init="pca", random_state=seed).fit_transform(flat).reshape(len(panels), len(rows), len(modalities), 2)
    figure = Figure(figsize=(4.6 * len(panels), 4.6), layout="constrained")
    axes = figure.subplots(1, len(panels), sharex=True, sharey=True, squeeze=False)[0]
    for axis, title, points in zip(axes, panels, plane, strict=True):
        for m, name in enumerate(modalities):
            axis.scatter(*points[:, m].T, s=6, color=COLOURS[m % len(COLOURS)], label=name, linewidths=0)
        axis.set(title=title, xticks=[], yticks=[])
    axes[0].legend(loc="best", markerscale=2, frameon=False)
    with replacing(path) as beside:
        figure.savefig(beside, dpi=140, format=path.suffix.lstrip(".") or "png")
