"""Draws step seconds and memory over context, from the JSON of run.py.

python -m benchmarks.plot results.json plot.png
"""

import collections
import json
import pathlib
import sys

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot


def main(results: str, picture: str):
  lines = collections.defaultdict(list)
  for row in json.loads(pathlib.Path(results).read_text()):
    label = " ".join([row["implementation"], row["attention"], *row["overrides"]])
    lines[label].append((row["context"], row["seconds"], row["peak_rss_bytes"] / 2**30))
  figure, (time_axes, memory_axes) = pyplot.subplots(1, 2, figsize=(12, 4.5), layout="constrained")
  for label, points in sorted(lines.items()):
    contexts, seconds, memory = zip(*sorted(points))
    time_axes.plot(contexts, seconds, marker="o", label=label)
    memory_axes.plot(contexts, memory, marker="o", label=label)
  for axes, name in ((time_axes, "seconds per training step"), (memory_axes, "peak memory of the process, GiB")):
    axes.set(xscale="log", yscale="log", xlabel="context, tokens", ylabel=name)
    axes.grid(True, which="both", alpha=0.3)
  time_axes.legend(fontsize=7)
  figure.savefig(picture, dpi=110)


if __name__ == "__main__":
  main(*sys.argv[1:])
