"""Load test of examples/server.py: many clients at the same time, each with one request after the other.

  python -m benchmarks.serve --folder=pretrained/photos32 --clients=32 --requests=4 --length=65

Starts the server on this machine (extra [serve]) and prints one JSON object: failed requests with their reasons,
seconds until an answer is complete and until its first tokens, and new tokens per second of all clients together.
"""

import concurrent.futures
import contextlib
import json
import pathlib
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator

import numpy as np
from absl import app, flags

_FOLDER = flags.DEFINE_string("folder", "pretrained/photos32", "Exported weights, or a run.")
_CLIENTS = flags.DEFINE_integer("clients", 32, "Clients at the same time.")
_REQUESTS = flags.DEFINE_integer("requests", 4, "Requests of each client.")
_LENGTH = flags.DEFINE_integer("length", 65, "New tokens of each request.")
_SERVER = pathlib.Path(__file__).parent.parent / "examples" / "server.py"


def post(url: str, **request) -> list[dict]:
  """Returns the lines of an answer, each with `seconds` since the request was sent; raises urllib.error.HTTPError."""
  body = urllib.request.Request(f"{url}/sample", json.dumps(request).encode(), {"Content-Type": "application/json"})
  start = time.monotonic()
  with urllib.request.urlopen(body, timeout=600) as answer:
    return [json.loads(line) | {"seconds": time.monotonic() - start} for line in answer]


def load(url: str, clients: int, requests: int, length: int) -> dict:
  """Returns the results of `clients` threads that send `requests` each, with prompts of different lengths."""

  def client(index: int) -> list[list[dict] | str]:
    results = []
    for number in range(requests):
      prompt = [2, *(3 + (index + position) % 200 for position in range((index * requests + number) % 100))]
      try:
        results.append(post(url, prompt=prompt, length=length, stream=True))
      except (OSError, ValueError) as error:
        results.append(f"{type(error).__name__}: {error}")
    return results

  start = time.monotonic()
  with concurrent.futures.ThreadPoolExecutor(clients) as pool:
    results = [result for results in pool.map(client, range(clients)) for result in results]
  seconds, answers = time.monotonic() - start, [lines for lines in results if isinstance(lines, list)]
  tokens = sum(len(lines[-1]["tokens"]) for lines in answers)
  first = [next(line["seconds"] for line in lines if line["tokens"]) for lines in answers]
  return {
    "requests": len(results),
    "failures": [result for result in results if isinstance(result, str)],
    "seconds": seconds,
    "tokens": tokens,
    "tokens_per_second": tokens / seconds,
    "answer_seconds": _percentiles([lines[-1]["seconds"] for lines in answers]),
    "first_tokens_seconds": _percentiles(first),
  }


def _percentiles(seconds: list[float]) -> dict[str, float]:
  names = {"median": 50, "p90": 90, "p99": 99, "longest": 100}
  return {name: round(float(np.percentile(seconds, percent)), 3) for name, percent in names.items() if seconds}


@contextlib.contextmanager
def start_server(folder: str) -> Iterator[str]:
  """Yields the address of a server that has compiled its programs."""
  with socket.socket() as unused:
    unused.bind(("127.0.0.1", 0))
    port = unused.getsockname()[1]
  command = [sys.executable, str(_SERVER), f"--folder={folder}", f"--port={port}"]
  server = subprocess.Popen(command, stdout=subprocess.DEVNULL)
  try:
    while server.poll() is None:
      with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
        break
      time.sleep(0.2)
    else:
      sys.exit(f"The server ended with exit code {server.returncode}.")
    yield f"http://127.0.0.1:{port}"
  finally:
    server.terminate()
    server.wait()


def main(_) -> None:
  with start_server(_FOLDER.value) as url:
    post(url, length=1)
    result = load(url, _CLIENTS.value, _REQUESTS.value, _LENGTH.value)
  print(json.dumps({"folder": _FOLDER.value, "clients": _CLIENTS.value, "length": _LENGTH.value, **result}))
  sys.exit(1 if result["failures"] else 0)


if __name__ == "__main__":
  app.run(main)
