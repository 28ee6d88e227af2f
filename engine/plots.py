"""Pictures of trainings and tests.

Their colours (Okabe & Ito; plasma) are distinct for colour-blind readers and in grey.
"""
import numpy as np
import torch

from datasets.official import CONVENTIONS
from util.files import whole_file
from util.metrics import kept_errors
from util.rotations import unit_poses
from util.units import in_unit

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
# The numbers kept per epoch, under TensorBoard's names; errors are medians.
CURVES = ("steps", "learning rate", "loss/epoch", "position error [m]/training", "orientation error [deg]/training",
          "position error [m]/validation", "orientation error [deg]/validation")
N_WORST, N_APART = 3, 10  # frames with the largest errors of position, and of orientation; how far apart if possible
LEAST = 1e-6  # metres, degrees: what is drawn for 0 on a logarithmic axis


def draw_training(path, losses, curves, final=None):
    """Write a picture of a training.

    losses: one per step. curves: a row per epoch with the numbers of CURVES, NaN where no validation was. final: the
    median errors of the final weights in validation, in metres and degrees.
    """
    save(training(np.array(losses), np.array(curves, float), final), path)


def draw_test(prefix, labels, truth, estimate, errors, frame, caption, before=None, novelty=None, convention=None):
    """Write the pictures of a test, and return their paths.

    They are <prefix>_positions.png, _errors.png, _sequences.png and _worst.png and, with novelty, _novelty.png.

    labels: a label file's table, N rows. truth, estimate: poses N x 7. errors: (position, orientation), N each, in
    metres and degrees. frame: row's position -> PIL image. caption: above every picture. before: the errors of the APR
    alone, where a PAE or a refinement was tested. novelty: N, where it is known. convention: as `vertical` takes it.
    """
    figures = {"positions": positions(labels["scene"], truth, estimate, errors[0], convention),
               "errors": cumulative(labels["scene"], errors, before),
               "sequences": sequences(labels, errors, before), "worst": worst(labels, errors, frame)}
    if novelty is not None and np.isfinite(novelty).any():
        figures["novelty"] = left_out(errors, novelty)
    paths = [f"{prefix}_{name}.png" for name in figures]
    for path, figure in zip(paths, figures.values()):
        figure.suptitle(caption, fontsize=8)
        save(figure, path)
    return paths


def training(losses, curves, final=None):
    """Loss, learning rate and errors over epochs."""
    steps, rate, loss, *errors = curves.T
    epochs = np.arange(1, len(curves) + 1)
    line = {"color": COLOURS[0], "marker": "o" if len(epochs) <= 30 else None, "markersize": 3}
    figure, panels = new_figure(9, 6.4, 2, 2, sharex=True)
    shown = slice(None, None, len(losses) // 5000 + 1)  # more points cannot be distinguished
    at = np.interp(np.arange(1, len(losses) + 1), [0, *steps], [0, *epochs])
    panels[0, 0].plot(at[shown], losses[shown], color="0.75", linewidth=0.6, label="a batch's")
    panels[0, 0].plot(epochs, loss, **line, label="an epoch's mean")
    panels[0, 0].set(ylabel="loss", title="Loss")
    if losses.min() > 0:
        _logarithmic(panels[0, 0])
    else:  # the first batches' can be far above the rest
        low, high = losses.min(), np.percentile(losses, 98)
        panels[0, 0].set_ylim(low - 0.05 * (high - low) - LEAST, high + 0.05 * (high - low) + LEAST)
    panels[0, 1].step([0, *epochs], [*rate[:1], *rate], color=COLOURS[0])
    panels[0, 1].set(ylabel="learning rate", title="Learning rate")
    _logarithmic(panels[0, 1])
    for k, axes, name, unit in zip((0, 1), panels[1], ("position", "orientation"), ("m", "deg")):
        of_training, of_validation = errors[k], errors[2 + k]
        validated = np.isfinite(of_validation)
        axes.plot(epochs, np.maximum(of_training, LEAST), **line, label="training, as it goes")
        if validated.any():
            axes.plot(epochs[validated], np.maximum(of_validation[validated], LEAST), "--s", color=COLOURS[1],
                      markersize=3, label="validation")
        if final is not None:
            axes.plot(epochs[-1], max(final[k], LEAST), "kD", markersize=5, label="the final weights")
        axes.set(xlabel="epoch", ylabel=f"median {name} error [{unit}]", title=f"{name.capitalize()} error")
        axes.xaxis.get_major_locator().set_params(integer=True)
        _logarithmic(axes)
    for axes in panels.flat:
        axes.grid(alpha=0.3)
    for axes, below in zip((panels[0, 0], *panels[1]), (0.02, 0.16, 0.16)):
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -below), ncols=3, frameon=False, fontsize=8)
    return figure


def positions(scenes, truth, estimate, errors, convention=None):
    """True and estimated positions from above and from the side, a row per scene.

    Each estimate is joined to its true position and coloured by its error. scenes: N names. truth, estimate: poses
    N x 7. errors: N, in metres. convention: as `vertical` takes it.
    """
    from matplotlib import colormaps
    from matplotlib.collections import LineCollection
    from matplotlib.colors import LinearSegmentedColormap, Normalize

    # The end of plasma is too light for paper.
    plasma = LinearSegmentedColormap.from_list("", colormaps["plasma"](np.linspace(0, 0.85, 256)))
    names = sorted(set(scenes))
    figure, panels = new_figure(9.5, 4.2 * len(names), len(names), 3, width_ratios=(1, 1, 0.05))
    for row, name in zip(panels, names):
        frames = np.flatnonzero(scenes == name)
        true, found, error = truth[frames, :3], estimate[frames, :3], errors[frames]
        up, downwards = vertical(truth[frames], convention)
        others = [(up + 1) % 3, (up + 2) % 3][::-1 if downwards else 1]  # right-handed, seen from above
        finite = np.isfinite(found).all(axis=1)
        spread = np.subtract(*np.percentile(true[:, others], (95, 5), axis=0))
        scale = Normalize(0, max(np.percentile(error[finite], 95) if finite.any() else 0, LEAST))
        views = {"above": others, "the side, not to scale": (others[int(spread[1] > spread[0])], up)}
        for axes, (side, (a, b)) in zip(row[:2], views.items()):
            axes.plot(true[:, a], true[:, b], ".", color="black", markersize=3, label="true")
            axes.add_collection(LineCollection(np.stack((true, found), axis=1)[finite][:, :, (a, b)], cmap=plasma,
                                               norm=scale, array=error[finite], linewidths=0.6, alpha=0.6))
            points = axes.scatter(found[finite, a], found[finite, b], c=error[finite], cmap=plasma, norm=scale, s=12,
                                  label="estimated")
            limits = [limits_of(true[:, k], found[finite, k]) for k in (a, b)]
            if side == "above":  # to one scale
                limits = to_one_scale(limits)
                mark = axes.legend(loc="best", markerscale=1.5).legend_handles[1]
                mark.set_array(None)
                mark.set_color("0.5")  # no error's
            distances = np.abs(np.stack((true, found))[:, :, (a, b)] - np.mean(limits, axis=1))
            outside = (distances > np.ptp(limits, axis=1) / 2).any(axis=(0, 2)).sum()
            axes.set(xlabel=f"{'xyz'[a]} [m]", ylabel=f"{'xyz'[b]} [m]", xlim=limits[0],
                     title=f"{_short(name)} from {side}" + (f", {outside} of {len(frames)} outside" if outside else ""),
                     ylim=limits[1][::-1] if b == up and downwards else limits[1], box_aspect=1)
            axes.locator_params(axis="x", nbins=6)
            axes.grid(alpha=0.3)
        figure.colorbar(points, cax=row[2], extend="max", label="position error [m]")
    return figure


def cumulative(scenes, errors, before=None):
    """Cumulative error curves of position and of orientation; a line per scene."""
    names = sorted(set(scenes))
    figure, panels = new_figure(9, 4.2 + 0.25 * len(names) * (2 if before else 1), 1, 2, sharey=True)
    for axes, k, name, unit in zip(panels[0], (0, 1), ("position", "orientation"), ("m", "deg")):
        lines = [(errors[k], "-", "")] + ([(before[k], "--", ", the APR alone")] if before else [])
        all_errors = np.concatenate([values for values, _, _ in lines])
        finite = all_errors[np.isfinite(all_errors)]
        most, largest = np.percentile(finite, (99, 100), method="lower") if len(finite) else (0, 0)
        limit = max(most if largest > 2 * most else largest, LEAST)  # the last hundredth can be as long as the rest
        for i, scene in enumerate(names):
            for values, style, suffix in lines:
                error = np.sort(values[scenes == scene])  # those that are not finite last
                shares = np.arange(len(error) + 1) / len(error) * 100
                axes.step([0, *error, max(1.02 * limit, error[-1])], [*shares, shares[-1]], style, where="post",
                          color=COLOURS[i % len(COLOURS)],
                          label=f"{np.median(error):.{3 - k}f} {unit}: {_short(scene)}{suffix}")
        beyond = len(errors[k]) - (errors[k] <= limit).sum()
        note = f", {beyond} of {len(errors[k])} frames beyond" if beyond else ""
        axes.set(xlabel=f"{name} error [{unit}]", xlim=(0, 1.02 * limit), ylim=(0, 101),
                 title=f"{name.capitalize()} error{note}")
        axes.grid(alpha=0.3)
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), title="median")
    panels[0, 0].set_ylabel("frames with at most this error [%]")
    return figure


def sequences(labels, errors, before=None):
    """Both errors frame by frame, sequence after sequence."""
    keys = (labels["scene"] + "/" if labels["scene"].nunique() > 1 else "") + labels["seq"].astype(str)
    order = np.argsort(keys.map({key: i for i, key in enumerate(keys.unique())}).to_numpy(), kind="stable")
    keys = keys.to_numpy()[order]
    begins = np.flatnonzero(keys[1:] != keys[:-1]) + 1
    figure, panels = new_figure(9, 6, 2, 1, sharex=True, subplot_kw={"yscale": "log"})
    for axes, k, name, unit in zip(panels[:, 0], (0, 1), ("position", "orientation"), ("m", "deg")):
        lines = [(errors[k], COLOURS[0], "each frame")]
        if before:
            median = f"median {np.median(before[k]):.{3 - k}f} {unit}"
            lines.insert(0, (before[k], "0.65", f"the APR alone: each frame, {median}"))
        for values, colour, label in lines:
            # Lines end where a sequence does.
            drawn = [np.insert(numbers, begins, np.nan)
                     for numbers in (np.arange(len(keys), dtype=float), np.maximum(values[order], LEAST))]
            style = "." if len(keys) > 1000 else ".-"
            axes.plot(*drawn, style, color=colour, linewidth=0.6, markersize=2.5, label=label)
        median = np.median(errors[k])
        axes.axhline(max(median, LEAST), color=COLOURS[1], linestyle="--", linewidth=1,
                     label=f"median {median:.{3 - k}f} {unit}")
        if len(begins) < 200:
            axes.vlines(begins - 0.5, 0, 1, transform=axes.get_xaxis_transform(), color="black", linewidth=0.6)
        axes.set(ylabel=f"{name} error [{unit}]", xlim=(-0.5, len(keys) - 0.5))
        _logarithmic(axes)
        axes.grid(alpha=0.3)
        axes.legend(loc="upper right", bbox_to_anchor=(1, -0.02 - 0.12 * k), ncols=3, frameon=False, fontsize=8)
    panels[1, 0].set_xlabel("frame, sequence by sequence", loc="left")
    panels[1, 0].xaxis.get_major_locator().set_params(integer=True)
    parts = sorted(zip([0, *begins], [*begins, len(keys)]), key=lambda part: part[0] - part[1])  # the longest first
    names = [_short(keys[begin]) for begin, _ in parts]
    lying = all(len(name) / 90 < (end - begin) / len(keys) for name, (begin, end) in zip(names, parts))
    middles, named = [], []
    for name, (begin, end) in zip(names, parts):  # as many as fit
        middle = (begin + end - 1) / 2
        if all(abs(middle - other) > 0.025 * len(keys) for other in middles):
            middles, named = [*middles, middle], [*named, name]
    top = panels[0, 0].secondary_xaxis("top")
    top.set_xticks(middles, named, rotation=0 if lying else 90)
    top.tick_params(length=0)
    return figure


def worst(labels, errors, frame):
    """The frames with the largest errors of position and, in the second row, of orientation.

    Each row is chosen for itself, so that a frame may be in both. frame: row's position -> PIL image.
    """
    figure, panels = new_figure(9, 5.8, 2, N_WORST)
    keys = (labels["scene"] + "/" + labels["seq"].astype(str)).to_numpy()
    for row, k, name in zip(panels, (0, 1), ("position", "orientation")):
        for axes in row:
            axes.set(xticks=[], yticks=[], frame_on=False)
        row[0].set_ylabel(f"largest {name} errors")
        for axes, i in zip(row, _worst_frames(keys, errors[k])):
            axes.imshow(frame(i))
            title = f"{_short(labels['img_path'].iloc[i], 44)}\n{errors[0][i]:.2f} m, {errors[1][i]:.1f} deg"
            axes.set_title(title, fontsize=8)
    return figure


def left_out(errors, novelty):
    """Mean errors of the frames that are kept, as the most novel ones are left out; beside the oracle, and chance."""
    known = np.isfinite((novelty, *errors)).all(axis=0)
    figure, panels = new_figure(9, 4.2, 1, 2)
    for axes, error, name, unit in zip(panels[0], errors, ("position", "orientation"), ("m", "deg")):
        error, shares = error[known], 100 * (1 - np.arange(1, known.sum() + 1) / known.sum())
        for score, colour, label in ((novelty[known], COLOURS[0], "the most novel frames"),
                                     (error, COLOURS[2], "those of the largest error: the oracle")):
            axes.plot(shares, kept_errors(error, score), color=colour, label=label)
        axes.axhline(error.mean(), color="0.5", linestyle="--", label="any frames: chance")
        axes.set(xlabel="frames left out [%]", ylabel=f"mean {name} error of the others [{unit}]", xlim=(0, 100),
                 ylim=(0, None), title=f"{name.capitalize()} error")
        axes.grid(alpha=0.3)
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), title="left out are")
    return figure


def vertical(poses, convention=None):
    """A scene's vertical axis: its number, and whether it points down. poses: N x 7.

    It is the axis along which the images' own vertical agrees best, which is right for cameras that look less than 45
    degrees up or down. convention: of the quaternions, of official.CONVENTIONS. Where it is unknown (None), it is taken
    to be the one under which the images agree more, which for several such cameras gives the same axis.
    """
    meanings = (True, False) if convention is None else (CONVENTIONS[convention],)
    down = max((camera_axes(poses, meaning)[0].nanmean(dim=1) for meaning in meanings), key=torch.linalg.vector_norm)
    axis = int(down.abs().argmax())
    return axis, bool(down[axis] > 0)


def camera_axes(poses, camera_to_world):
    """The images' downward axes and the cameras' optical axes: 3 x N each. poses: N x 7.

    camera_to_world: whether that is what quaternions are; otherwise they are world-to-camera.
    """
    w, x, y, z = unit_poses(torch.as_tensor(poses, dtype=torch.double))[:, 3:].T
    w = w if camera_to_world else -w
    return (torch.stack((2 * (x * y - w * z), 1 - 2 * (x * x + z * z), 2 * (y * z + w * x))),
            torch.stack((2 * (x * z + w * y), 2 * (y * z - w * x), 1 - 2 * (x * x + y * y))))


def _worst_frames(keys, error):
    """The indices of the N_WORST frames to show. keys: the frames' sequences.

    First come the largest errors at least N_APART frames apart within a sequence, since nearer frames show the same;
    where these are too few, the largest of the others follow.
    """
    order = np.argsort(-np.nan_to_num(error, nan=np.inf), kind="stable")
    apart = []
    for i in order:
        if len(apart) < N_WORST and all(keys[i] != keys[j] or abs(i - j) >= N_APART for j in apart):
            apart.append(i)
    return [*apart, *(i for i in order if i not in apart)][:N_WORST]


def limits_of(*values):
    """An axis' limits around values, but for those far outside."""
    values = np.concatenate(values)
    low, high = np.percentile(values, (5, 95))
    near = values[np.abs(values - (low + high) / 2) <= 2 * (high - low)]
    low, high = near.min(), near.max()
    margin = 0.05 * (high - low) + 0.01
    return low - margin, high + margin


def to_one_scale(limits):
    """Limits of two axes, (low, high) each, widened to the same length."""
    half = max(high - low for low, high in limits) / 2
    return [((low + high) / 2 - half, (low + high) / 2 + half) for low, high in limits]


def _short(name, length=20):
    return name if len(name) <= length else f"...{name[3 - length:]}"


def _logarithmic(axes):
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    axes.set_yscale("log")
    low, high = axes.get_ylim()
    axes.yaxis.set_major_locator(LogLocator(
        subs=(1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 7, 8) if high < 4 * low else (1, 2, 3, 5, 7) if high < 10 * low
        else (1, 2, 5) if high < 1000 * low else (1,)))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def new_figure(width, height, n_rows, n_columns, **options):
    """A figure of width x height inches, and its axes, n_rows x n_columns."""
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcParams["text.parse_math"] = False  # names may have dollar signs
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(n_rows, n_columns, squeeze=False, **options)


def save(figure, path):
    """Write a figure as PNG, completely or not at all."""
    from matplotlib.text import Text

    if in_unit("[m]") != "[m]":
        for text in figure.findobj(lambda artist: isinstance(artist, Text) and "[m]" in artist.get_text()):
            text.set_text(in_unit(text.get_text()))
    with whole_file(path, "wb") as file:
        figure.savefig(file, format="png", dpi=120, pil_kwargs={"compress_level": 2})  # a third of the time
