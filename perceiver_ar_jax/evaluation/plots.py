"""Pictures of figures, where matplotlib is installed (extra [plots])."""

import itertools
from collections.abc import Mapping, Sequence

from etils import epath

MISSING = " (no picture: pip install 'perceiver_ar_jax[plots]' for matplotlib)"

Curves = Mapping[str, tuple[Sequence[float], Sequence[float]]]
"""By label: x and y."""


def curves(
  path: epath.Path,
  panels: Mapping[str, Curves],
  *,
  y_label: str,
  title: str,
  marks: Mapping[str, Sequence[str]] | None = None,
  log_x: bool = True,
) -> bool:
  """Writes a PNG of panels side by side, by the names of their x axes; False without matplotlib.

  Args:
    path: where to.
    panels: the curves of each.
    y_label: what y is, in all panels.
    title: over all.
    marks: by label, words beside the points of that curve.
    log_x: whether x is logarithmic.
  """
  try:
    from matplotlib import figure as figure_lib
  except ImportError:
    return False
  figure = figure_lib.Figure(figsize=(5.5 * len(panels), 4.5), layout="constrained")
  for axes, (x_label, lines) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items()):
    for (label, (xs, ys)), marker in zip(lines.items(), itertools.cycle("osv^D<>")):
      axes.plot(xs, ys, marker=marker, markersize=4, label=label or None)
      for x, y, word in zip(xs, ys, (marks or {}).get(label, [])):
        axes.annotate(word, (x, y), textcoords="offset points", xytext=(4, 4), fontsize=8)
    axes.set(xlabel=x_label, ylabel=y_label, xscale="log" if log_x else "linear")
    axes.grid(True, which="both", alpha=0.3)
    if any(lines):
      axes.legend(fontsize=8)
  figure.suptitle(title)
  with path.open("wb") as file:
    figure.savefig(file, dpi=110)
  return True
