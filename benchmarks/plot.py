"""Plots seconds per step and memory over the context, from the JSON of run.py.

python -m benchmarks.plot results.json plot.png
"""

import collections
import itertools
import json
import pathlib
import sys

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot, ticker


def main(results: str, picture: str):
  lines = collections.defaultdict(list)
  for row in json.loads(pathlib.Path(results).read_text()):
    label = row["implementation"]
    if row["attention"] != "its own":
      label = ", ".join([f"{label} {row['attention']}", *(word.split(".")[-1] for word in row["overrides"])])
    lines[label].append((row["context"], row["seconds"], row["peak_rss_bytes"] / 2**30))
  curves = {label: sorted(points) for label, points in sorted(lines.items()) if len(points) > 1}
  figure, (time_axes, memory_axes) = pyplot.subplots(1, 2, figsize=(11, 5), layout="constrained")
  for (label, points), marker in zip(curves.items(), itertools.cycle("osv^D<>")):
    contexts, seconds, memory = zip(*points)
    time_axes.plot(contexts, seconds, marker=marker, label=label)
    memory_axes.plot(contexts, memory, marker=marker)
  for axes, name in ((time_axes, "seconds per training step"), (memory_axes, "peak memory of the process, GiB")):
    axes.set(xscale="log", yscale="log", xlabel="context, tokens", ylabel=name)
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(ticker.NullFormatter())
    axes.grid(True, which="both", alpha=0.3)
  memory_axes.set_yticks([0.5, 0.7, 1, 1.5, 2, 3, 4, 5])
  memory_axes.set_ylim(0.5, 6)
  figure.legend(loc="outside lower center", ncols=3, fontsize=8)
  figure.savefig(picture, dpi=110)


if __name__ == "__main__":
  main(*sys.argv[1:])
