"""The loss curves of all schemes, one panel per network."""

import pathlib

from matplotlib.figure import Figure

Curves = dict[str, dict[str, list[float]]]


def save(curves: Curves, path: pathlib.Path) -> None:
    """`curves`: network -> scheme -> mean loss of every epoch. The format follows from the suffix."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    panels = figure.subplots(1, len(curves), squeeze=False)[0]
    for axes, (network, schemes) in zip(panels, curves.items(), strict=True):
        for scheme, losses in schemes.items():
            axes.plot(range(1, len(losses) + 1), losses, label=scheme, linewidth=1)
        axes.set(title=network, xlabel="epoch", ylabel="training loss (nats)", yscale="log")
        axes.legend(fontsize="small")
    figure.savefig(path)
