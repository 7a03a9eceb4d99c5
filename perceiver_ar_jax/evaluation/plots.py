"""Pictures of figures."""

import io
import itertools
from collections.abc import Mapping, Sequence

from matplotlib import figure as figure_lib

Curves = Mapping[str, tuple[Sequence[float], Sequence[float]]]
"""By label: x and y."""


def curves(
  panels: Mapping[tuple[str, str], Curves],
  *,
  title: str = "",
  marks: Mapping[str, Sequence[str]] | None = None,
  log_x: bool = False,
  form: str = "png",
) -> bytes:
  """A picture of panels side by side.

  Args:
    panels: the curves of each, by the names of its x and y axes.
    title: over all.
    marks: by label, words beside the points of that curve; points are then shown.
    log_x: whether x is logarithmic, where it spans a factor of ten.
    form: png or svg.
  """
  figure = figure_lib.Figure(figsize=(5.5 * len(panels), 4.5), layout="constrained")
  for axes, ((x_label, y_label), lines) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items()):
    for (label, (xs, ys)), marker in zip(lines.items(), itertools.cycle("osv^D<>")):
      axes.plot(xs, ys, marker=marker if len(xs) < 30 else "", markersize=4, label=label)
      for x, y, word in zip(xs, ys, (marks or {}).get(label, [])):
        axes.annotate(word, (x, y), textcoords="offset points", xytext=(4, 4), fontsize=8)
    values = [x for xs, _ in lines.values() for x in xs]
    wide = log_x and bool(values) and max(values) >= 10 * min(values)
    axes.set(xlabel=x_label, ylabel=y_label)
    if wide:
      axes.set_xscale("log")
    else:
      axes.ticklabel_format(axis="x", scilimits=(-3, 5))
    axes.grid(True, which="both", alpha=0.3)
    if any(lines):
      axes.legend(fontsize=8)
  figure.suptitle(title)
  file = io.BytesIO()
  figure.savefig(file, format=form, dpi=110)
  return file.getvalue()
