"""Measures training steps over contexts and attention kernels, prints a table and stores all metrics as JSON.

  python -m benchmarks.run --contexts 2048 8192 32768 --attention auto reference --peers torch --out=results.json

Every measurement runs in a process of its own, so that its peak memory includes nothing else. The processes take turns
for --rounds rounds, so that a temporarily slow machine affects all of them; the results are medians over the rounds.
Other arguments, such as --config.train.batch_size=1, are passed to the config. `python -m benchmarks.plot results.json
plot.png` plots the results.
"""

import argparse
import json
import pathlib
import platform
import statistics
import subprocess
import sys

_ROOT = pathlib.Path(__file__).parent.parent
_PEERS = {
  "torch": ("torch", "perceiver-ar-pytorch==0.0.10"),
  "official": ("jax[cpu]", "dm-haiku", "flax", "chex", "optax", "tensorflow-probability"),
}
"""What the environment of each peer contains; peer_<name>.py measures it."""
_MEDIANS = ("seconds", "targets_per_second", "compile_seconds", "peak_rss_bytes")


def main():
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--config", default="benchmarks/point_a.py")
  parser.add_argument("--contexts", type=int, nargs="+", required=True)
  parser.add_argument("--attention", nargs="+", default=["auto"])
  parser.add_argument(
    "--peers", nargs="+", default=[], choices=_PEERS, help="also measure these, each in an environment of its own"
  )
  parser.add_argument("--official", metavar="CHECKOUT", help="of github.com/google-research/perceiver-ar, for its peer")
  parser.add_argument("--compile", action="store_true", help="also measure the peer torch with torch.compile")
  parser.add_argument("--rounds", type=int, default=3)
  parser.add_argument("--steps", type=int, default=7)
  parser.add_argument("--seconds", type=float, default=60.0, help="maximum time for the steps of one measurement")
  parser.add_argument("--out", required=True, help="JSON file; results are appended to its content")
  arguments, overrides = parser.parse_known_args()
  if arguments.peers and (overrides or arguments.config != parser.get_default("config")):
    parser.error("--peers measure their own copy of point A: leave --config and other settings as they are")
  if "official" in arguments.peers and not arguments.official:
    parser.error("--peers official needs --official=CHECKOUT, the folder of the cloned release")
  peers = [[str(_python(name)), f"benchmarks/peer_{name}.py"] for name in arguments.peers]
  for peer in peers[:]:
    if "official" in peer[1]:
      peer.append(f"--path={arguments.official}")
    elif arguments.compile:
      peers.append([*peer, "--compile"])
  limits = [f"--steps={arguments.steps}", f"--seconds={arguments.seconds}"]
  commands = []
  for context in arguments.contexts:
    for attention in arguments.attention:
      commands.append(
        [
          sys.executable,
          "-m",
          "benchmarks.step",
          f"--config={arguments.config}",
          f"--config.model.attention={attention}",
        ]
        + [f"--context={context}", *limits, *overrides]
      )
    commands += [[*peer, f"--context={context}", *limits] for peer in peers]
  out = pathlib.Path(arguments.out)
  stored = json.loads(out.read_text()) if out.exists() else []
  rows = [[] for _ in commands]
  for index in range(arguments.rounds):
    for command, row in zip(commands, rows):
      row.append(_measure(command))
      print(f"round {index + 1} of {arguments.rounds}: {_line(row[-1])}", flush=True)
    # After every round, so that a later failure loses no earlier measurement.
    results = [_median(row) | {"overrides": overrides, "rounds": len(row)} for row in rows]
    out.write_text(json.dumps(stored + results, indent=2) + "\n")
  print(f"\nMedians of {arguments.rounds} rounds, {platform.machine()}, also in {out}:")
  print("\n".join(map(_line, results)))


def _measure(command: list[str]) -> dict:
  result = subprocess.run(command, cwd=_ROOT, capture_output=True, text=True)
  if result.returncode:
    sys.exit(f"{' '.join(command)} failed:\n{result.stderr[-3000:]}")
  return json.loads(result.stdout.strip().splitlines()[-1])


def _median(row: list[dict]) -> dict:
  middle = {name: statistics.median(entry[name] for entry in row) for name in _MEDIANS}
  return row[0] | middle | {"all_seconds": [entry["seconds"] for entry in row]}


def _line(row: dict) -> str:
  temp = f"{row['temp_bytes'] / 2**20:8.0f} MiB temporary" if row["temp_bytes"] is not None else " " * 22
  return (
    f"{row['implementation']:20s} {row['attention']:10s} context {row['context']:9,d}: {row['seconds']:8.3f} s per"
    f" step, {row['targets_per_second']:8,.0f} targets/s, {temp}, {row['peak_rss_bytes'] / 2**20:6.0f} MiB peak RSS,"
    f" compiled in {row['compile_seconds']:.1f} s"
  )


def _python(peer: str) -> pathlib.Path:
  """Returns the interpreter of a peer's environment, which is created the first time."""
  folder = _ROOT / f".venv-{peer}"
  if not folder.exists():
    print(f"Installing {', '.join(_PEERS[peer])} into {folder}", flush=True)
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    subprocess.run([str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet", *_PEERS[peer]], check=True)
  return folder / "bin" / "python"


if __name__ == "__main__":
  main()
