"""Line plots of metrics."""

import io
import itertools
from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure

Curves = Mapping[str, tuple[Sequence[float], Sequence[float]]]
"""x and y values by label."""


def curves(
  panels: Mapping[tuple[str, str], Curves],
  *,
  title: str = "",
  point_labels: Mapping[str, Sequence[str]] | None = None,
  log_x: bool = False,
) -> bytes:
  """Returns a PNG of panels side by side, given the curves of each panel by the names of its x and y axes.

  `point_labels` are texts beside the points, by label of the curve; `log_x` takes effect from a factor of ten.
  """
  figure = Figure(figsize=(5.5 * len(panels), 4.5), layout="constrained")
  for axes, ((x_label, y_label), lines) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items()):
    for (label, (xs, ys)), marker in zip(lines.items(), itertools.cycle("osv^D<>")):
      axes.plot(xs, ys, marker=marker if len(xs) < 30 else "", markersize=4, label=label)
      for x, y, text in zip(xs, ys, (point_labels or {}).get(label, [])):
        axes.annotate(text, (x, y), textcoords="offset points", xytext=(4, 4), fontsize=8)
    all_xs = [x for xs, _ in lines.values() for x in xs]
    axes.set(xlabel=x_label, ylabel=y_label)
    if log_x and all_xs and max(all_xs) >= 10 * min(all_xs):
      axes.set_xscale("log")
    else:
      axes.ticklabel_format(axis="x", scilimits=(-3, 5))
    axes.grid(True, which="both", alpha=0.3)
    if any(lines):
      axes.legend(fontsize=8)
  figure.suptitle(title)
  file = io.BytesIO()
  figure.savefig(file, format="png", dpi=110)
  return file.getvalue()
