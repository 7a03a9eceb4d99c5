"""Measures the training step of the package perceiver-ar-pytorch, and prints the same fields as step.py.

Runs in an environment of its own, which run.py --peers torch creates. Sizes and optimizer are those of point_a.py. Its
blocks differ in details (GELU, learned and rotary positions together, no z-loss), but its matrix products are the same.
"""

import argparse
import json
import resource
import statistics
import time

import torch
from perceiver_ar_pytorch import PerceiverAR


def main():
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--context", type=int, required=True)
  parser.add_argument("--steps", type=int, default=7)
  parser.add_argument("--seconds", type=float, default=60.0)
  parser.add_argument("--compile", action="store_true", help="with torch.compile")
  arguments = parser.parse_args()
  batch, latents, width, heads, layers = 2, 256, 256, 8, 4
  torch.manual_seed(0)
  model = PerceiverAR(
    num_tokens=259,
    dim=width,
    depth=layers,
    dim_head=width // heads,
    heads=heads,
    dropout=0.1,
    max_seq_len=arguments.context,
    cross_attn_seq_len=arguments.context - latents,
  )
  if arguments.compile:
    model = torch.compile(model)
  optimizer = torch.optim.Adam(model.parameters(), lr=3e-4)
  tokens = torch.randint(3, 259, (batch, arguments.context))
  labels = torch.randint(3, 259, (batch, arguments.context))
  times, begin = [], time.perf_counter()
  for _ in range(arguments.steps + 1):
    start = time.perf_counter()
    optimizer.zero_grad()
    loss = model(tokens, labels=labels)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    times.append(time.perf_counter() - start)
    if arguments.compile and len(times) == 1:
      begin = time.perf_counter()  # without the minutes of compilation
    if time.perf_counter() - begin > arguments.seconds:
      break
  timed = times[1:] or times
  metrics = {
    "implementation": "perceiver-ar-pytorch",
    "version": f"torch {torch.__version__}, {torch.get_num_threads()} threads",
    "attention": "torch.compile" if arguments.compile else "its own",
    "context": arguments.context,
    "seconds": statistics.median(timed),
    "all_seconds": timed,
    "targets_per_second": batch * latents / statistics.median(timed),
    "compile_seconds": times[0] if arguments.compile else 0.0,
    "temp_bytes": None,
    "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    "num_params": sum(parameter.numel() for parameter in model.parameters()),
    "loss": float(loss),
  }
  print(json.dumps(metrics), flush=True)


if __name__ == "__main__":
  main()
