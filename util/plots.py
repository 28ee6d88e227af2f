"""Pictures of a run."""
from util.files import whole_file


def plot_loss(path, samples, losses):
    """Write a picture of the loss over the samples seen. samples, losses: one number a batch."""
    figure, axes = _pyplot().subplots(figsize=(8, 5))
    axes.plot(samples, losses, linewidth=0.8)
    axes.set(xlabel="samples seen", ylabel="loss of a batch", title="Training loss")
    axes.grid(alpha=0.3)
    _save(figure, path)


def plot_paths(path, scenes):
    """Write a picture of paths seen from above. scenes: {name: (true, {estimator: estimate, ...})}, positions N x 2 in
    metres; each estimate is joined to the truth."""
    figure, panels = _pyplot().subplots(1, len(scenes), figsize=(7 * len(scenes), 5.5), squeeze=False)
    for axes, (scene, (true, estimates)) in zip(panels[0], scenes.items()):
        axes.plot(*true.T, color="black", linewidth=1.5, label="true")
        # Colours that all eyes tell apart (Okabe & Ito), and markers.
        for (name, estimate), colour, marker in zip(estimates.items(), ("#E69F00", "#0072B2"), "ox", strict=True):
            for a, b in zip(true, estimate):
                axes.plot([a[0], b[0]], [a[1], b[1]], color=colour, linewidth=0.4, alpha=0.6)
            axes.plot(*estimate.T, marker, color=colour, markersize=4, label=name)
        axes.set(xlabel="x [m]", ylabel="y [m]", title=f"{scene}: test path from above", aspect="equal")
        axes.grid(alpha=0.3)
        axes.legend()
    _save(figure, path)


def _pyplot():
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _save(figure, path):
    with whole_file(path, "wb") as file:
        figure.savefig(file, format="png", dpi=120, bbox_inches="tight")
    _pyplot().close(figure)
