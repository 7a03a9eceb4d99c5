"""examples/server.py: answers to many clients, streams, prompts that look like files, and requests that are refused."""

import concurrent.futures
import contextlib
import http.client
import importlib.util
import json
import threading
import time
import urllib.error

import pytest

from benchmarks import serve
from configs import image_files, text_files
from perceiver_ar_jax import Sampler
from perceiver_ar_jax.data import EOS
from tests import tiny
from tests.sampling_sampler_test import resolve, sampler

pytest.importorskip("fastapi")
uvicorn = pytest.importorskip("uvicorn")

_SPEC = importlib.util.spec_from_file_location("server", tiny.ROOT / "examples" / "server.py")
server = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(server)


@pytest.fixture(scope="module")
def text():
  return sampler(resolve(text_files))


@contextlib.contextmanager
def running(*arguments, **named):
  """Yields the address of an app that runs in another thread."""
  running = uvicorn.Server(uvicorn.Config(server.create_app(*arguments, **named), port=0, log_level="error"))
  thread = threading.Thread(target=running.run)
  thread.start()
  try:
    while not running.started:
      assert thread.is_alive()
      time.sleep(0.01)
    yield f"http://127.0.0.1:{running.servers[0].sockets[0].getsockname()[1]}"
  finally:
    running.should_exit = True
    thread.join()


@pytest.fixture(scope="module")
def url(text):
  with running(text, batch_size=4) as url:
    yield url


def refusal(url: str, body: bytes | dict) -> tuple[int, str]:
  """The status and the message of a request that is refused; the answer contains nothing else."""
  connection = http.client.HTTPConnection(url.removeprefix("http://"))
  body = body if isinstance(body, bytes) else json.dumps(body)
  connection.request("POST", "/sample", body, {"Content-Type": "application/json"})
  answer = connection.getresponse()
  content = json.loads(answer.read())
  assert list(content) == ["error"]
  return answer.status, content["error"]


def test_many_clients_are_answered(url):
  result = serve.load(url, clients=32, requests=2, length=7)
  assert result["failures"] == [] and result["requests"] == 64
  assert 64 <= result["tokens"] <= 64 * 7  # a sample may end with its first token


def test_answers_do_not_depend_on_other_requests(text, url):
  beginnings = [("x" * number + "Once", 3 + number % 5) for number in range(12)]

  def ask(beginning):
    prompt, length = beginning
    return serve.post(url, prompt=prompt, length=length, temperature=0)

  with concurrent.futures.ThreadPoolExecutor(12) as pool:
    answers = list(pool.map(ask, beginnings))
  for (prompt, length), (answer,) in zip(beginnings, answers):
    (expected,) = text([prompt], length=length, temperature=0, batch_size=4)
    assert answer["text"] == expected.value
    assert answer["tokens"] == expected.events[len(expected.prompt.events) :].tolist()


def test_a_stream_has_a_line_for_each_block_and_ends_with_the_whole_sample(text, url):
  lines = serve.post(url, prompt="Once", length=20, temperature=0, stream=True)
  (whole,) = serve.post(url, prompt="Once", length=20, temperature=0)
  assert lines[0]["tokens"] == [] and lines[0]["text"] == "Once" and len(lines) > 3
  for before, after in zip(lines, lines[1:]):
    assert after["tokens"][: len(before["tokens"])] == before["tokens"] and len(after["tokens"]) > len(before["tokens"])
  assert (lines[-1]["tokens"], lines[-1]["text"]) == (whole["tokens"], whole["text"])


def test_prompts_are_texts_or_tokens_and_never_files(url):
  for prompt in ("data", "README.md", "@README.md", "/etc/passwd", "tests/*.py", "~/.netrc"):
    (answer,) = serve.post(url, prompt=prompt, length=1)
    assert answer["text"].startswith(prompt)
  (answer,) = serve.post(url, prompt=[2, 75, 76], length=1)
  assert answer["text"].startswith("HI") and len(answer["tokens"]) == 1
  (answer,) = serve.post(url, length=2)
  assert 1 <= len(answer["tokens"]) <= 2


@pytest.mark.parametrize(
  ("body", "words"),
  [
    ({"prompt": " "}, "The prompt is empty"),
    ({"prompt": []}, "The prompt has no events"),
    ({"prompt": [2, 999]}, "unknown token 999"),
    ({"prompt": [-1]}, "unknown token -1"),
    ({"prompt": [2**70]}, "give integers"),
    ({"prompt": "\ud800"}, "not a text in Unicode"),
    ({"prompt": "x" * 100_001}, "prompt: "),
    ({"prompt": {"file": "/etc/passwd"}}, "str: Input should be a valid string"),
    ({"length": 0}, "length: Input should be greater than or equal to 1"),
    ({"length": 10**9}, "length: "),
    ({"top_p": 2}, "top_p: "),
    ({"top_k": 10**30}, "top_k: "),
    ({"temperature": float("nan")}, "temperature"),
    ({"temperature": -1, "top_p": 0}, "temperature: Input should be greater than or equal to 0; top_p: "),
    ({"temprature": 1}, "temprature: Extra inputs are not permitted"),
    (b"{", "JSON decode error"),
    (b"", "Field required"),
    (b"[]", "valid dictionary"),
  ],
)
def test_bad_requests_are_refused_with_one_message(url, body, words):
  status, message = refusal(url, body)
  assert status == 400 and words in message, message


def test_a_model_of_pictures_takes_tokens(text):
  config = resolve(image_files, dict(image_size=4), dict(max_context=48, position_sizes=(6, 6, 5)))
  with running(sampler(config)) as url:
    (answer,) = serve.post(url, prompt=[2, 40, 41], length=1000)
    assert len(answer["tokens"]) == 46 and answer["text"] is None  # up to the end of the picture
    status, message = refusal(url, {"prompt": "a cat"})
    assert status == 400 and "give token ids" in message


def test_a_failure_is_an_error_of_its_own_requests(text, monkeypatch):
  stream = text.stream

  def failing(given, **settings):
    growing = stream(given, **settings)
    return iter(lambda: 1 / 0, None) if settings.get("length") == 13 else growing

  monkeypatch.setattr(text, "stream", failing)
  with running(text, batch_size=4) as url:
    with pytest.raises(urllib.error.HTTPError, match="500"):
      serve.post(url, prompt="Once", length=13)
    (answer,) = serve.post(url, prompt="Once", length=5)
    assert answer["text"].startswith("Once")


def test_a_server_that_is_busy_says_so(text):
  with running(text, max_waiting=0) as url:
    assert refusal(url, {"prompt": "Once"}) == (503, "The server is busy: try again later.")


def test_nothing_more_is_drawn_for_a_client_that_left(text, monkeypatch):
  bias = text.params["to_logits"]["bias"].at[EOS].set(-1e9)  # so that only the length ends a sample
  endless = Sampler(text.config, text.params | {"to_logits": text.params["to_logits"] | {"bias": bias}})
  steps, stream = [], endless.stream

  def counting(given, **settings):
    for samples in stream(given, **settings):
      steps.append(samples)
      yield samples

  monkeypatch.setattr(endless, "stream", counting)
  with running(endless, batch_size=4) as url:
    connection = http.client.HTTPConnection(url.removeprefix("http://"))
    body = json.dumps({"prompt": "Once", "length": 10_000, "stream": True})
    connection.request("POST", "/sample", body, {"Content-Type": "application/json"})
    assert json.loads(connection.getresponse().readline())["text"] == "Once"
    connection.close()
    serve.post(url, prompt="Once", length=5, temperature=0)  # drawn after the first one
  assert len(steps) < 1000  # of more than 3,000
