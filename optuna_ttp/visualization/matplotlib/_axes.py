"""Axes that the plots are drawn into."""

from __future__ import annotations

from typing import TYPE_CHECKING

import optuna

from optuna_ttp._util.checks import check_kind


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis


def label_plainly(axis: Axis) -> None:
    """Label a logarithmic axis with plain numbers, also if it spans less than a decade."""
    from matplotlib import ticker

    low, high = axis.get_view_interval()
    narrow = high < 200 * low
    axis.set_major_locator(ticker.LogLocator(subs=(1.0, 2.0, 5.0) if narrow else (1.0,)))
    axis.set_major_formatter(ticker.StrMethodFormatter("{x:g}"))
    axis.set_minor_formatter(ticker.NullFormatter())


def resolve_axes(ax: Axes | None, *studies: optuna.Study) -> Axes:
    """Return the given axes, or for None new axes; raise TypeError for what is no study."""
    for study in studies:
        check_kind("study", study, optuna.Study)
    if ax is not None:
        return ax
    try:
        from matplotlib import pyplot
    except ImportError as error:
        raise ImportError(
            "Plots need Matplotlib: pip install 'optuna_ttp[visualization]'."
        ) from error
    axes: Axes = pyplot.subplots()[1]
    return axes
