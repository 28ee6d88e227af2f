"""Pictures of a run."""
from util.files import whole_file


def plot_loss(path, samples, losses):
    """Write a picture of the loss over the samples seen. samples, losses: one number a batch."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5))
    axes.plot(samples, losses, linewidth=0.8)
    axes.set(xlabel="samples seen", ylabel="loss of a batch", title="Training loss")
    axes.grid(alpha=0.3)
    with whole_file(path, "wb") as file:
        figure.savefig(file, format="png", dpi=120, bbox_inches="tight")
    pyplot.close(figure)
