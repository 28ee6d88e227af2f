"""The picture of predicted poses among those that the APR was trained on."""
import numpy as np

from datasets.official import CONVENTIONS
from engine.plots import COLOURS, camera_axes, limits_of, new_figure, save, to_one_scale, vertical


def draw_predictions(path, training, poses, novelty=None, convention=None):
    """Write a picture of predicted poses among those of the training, from above and from the side; returns path.

    training: M x 7. poses: N x 7, NaN for rejected ones. novelty: N, or None. convention: of official.CONVENTIONS, or
    None where it is unknown: then there are no viewing directions.
    """
    save(predicted(training, poses, novelty, convention), path)
    return path


def predicted(training, poses, novelty=None, convention=None):
    """Predicted positions among the training's, from above and from the side."""
    poses = np.asarray(poses, float)
    finite = np.isfinite(poses).all(axis=1)
    known = training if len(training) else poses[finite]
    up, downwards = vertical(known, convention) if len(known) else (2, False)
    others = [(up + 1) % 3, (up + 2) % 3][::-1 if downwards else 1]
    figure, panels = new_figure(9.5, 4.6, 1, 2)
    marks = {"c": COLOURS[1]} if novelty is None else {"c": np.asarray(novelty)[finite], "cmap": "plasma"}
    everything = np.concatenate((np.reshape(training, (-1, 7)), poses[finite]))
    for axes, (side, (a, b)) in zip(panels[0], {"above": others, "the side": (others[0], up)}.items()):
        for some, label, grey, style in ((training, "trained on", "0.8", {"s": 5, "c": "0.7"}),
                                         (poses[finite], "predicted", "0.4", {"s": 16, **marks})):
            if len(some):
                if convention is not None:
                    ahead = camera_axes(some, CONVENTIONS[convention])[1].numpy()
                    axes.quiver(some[:, a], some[:, b], ahead[a], ahead[b], angles="xy", color=grey, width=0.002,
                                scale=25, headwidth=4)
                points = axes.scatter(some[:, a], some[:, b], zorder=3, label=label, **style)
        axes.set(xlabel=f"{'xyz'[a]} [m]", ylabel=f"{'xyz'[b]} [m]", title=f"from {side}")
        if len(everything):
            limits = to_one_scale([limits_of(everything[:, k]) for k in (a, b)])
            axes.set(xlim=limits[0], ylim=limits[1][::-1] if b == up and downwards else limits[1], box_aspect=1)
        axes.grid(alpha=0.3)
    panels[0, 0].legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=2)
    if novelty is not None and finite.any():
        figure.colorbar(points, ax=panels[0], label="novelty")
    return figure
