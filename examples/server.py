"""Serves samples of a trained model over HTTP, for those who copy and change it; docs/serving.md describes it.

python examples/server.py --folder=FOLDER     # exported weights, or a run; needs pip install -e '.[serve]'
"""

import argparse
import asyncio
import json
import random

import numpy as np
import uvicorn
from fastapi import FastAPI, exceptions
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import BaseModel, Field

from perceiver_ar_jax import Sampler
from perceiver_ar_jax.config import InputError


class Request(BaseModel, extra="forbid"):
  prompt: str | list[int] = Field([2], max_length=100_000)  # a text, or token ids, of which 2 begins a document
  length: int = Field(100, ge=1, le=10_000)  # new tokens, at most
  temperature: float = Field(1.0, ge=0, le=100)
  top_k: int = Field(0, ge=0, le=1_000_000)
  top_p: float = Field(1.0, gt=0, le=1)
  stream: bool = False  # a line of JSON for each block of tokens


class Job:
  def __init__(self, request: Request):
    self.prompt = request.prompt if isinstance(request.prompt, str) else np.array(request.prompt)
    self.settings, self.length = request.model_dump(include={"temperature", "top_k", "top_p"}), request.length
    self.samples, self.is_done = asyncio.Queue(), False  # ever longer ones; after the last None, or an error

  async def answers(self):  # yields what the sample has grown to
    try:
      while not self.is_done and (sample := await self.samples.get()) is not None:
        if isinstance(sample, Exception):
          raise sample
        events = sample.events[: len(sample.prompt.events) + self.length]
        new, is_text = events[len(sample.prompt.events) :], sample.task.modality == "text"
        self.is_done = len(new) == self.length or events[-1] == 1  # which ends a document
        yield {"tokens": new.tolist(), "text": sample.task.decode(events) if is_text else None}
    finally:
      self.is_done = True  # also if the client left


def create_app(sampler: Sampler, batch_size: int = 8, max_waiting: int = 256) -> FastAPI:
  app, waiting, tasks = FastAPI(title="perceiver_ar_jax"), [], set()

  async def draw():  # those that wait and have the same settings together
    while waiting:
      jobs = [job for job in waiting if job.settings == waiting[0].settings][:batch_size]
      waiting[:] = [job for job in waiting if job not in jobs]
      settings = jobs[0].settings | {"length": max(job.length for job in jobs), "seed": random.getrandbits(32)}
      try:
        growing = sampler.stream([job.prompt for job in jobs], batch_size=batch_size, **settings)
        while not all(job.is_done for job in jobs) and (samples := await asyncio.to_thread(next, growing, None)):
          for job, sample in zip(jobs, samples):
            job.samples.put_nowait(sample)
        end = None
      except Exception as error:  # of this batch; others may succeed
        end = error
      for job in jobs:
        job.samples.put_nowait(end)
    tasks.clear()

  @app.exception_handler(InputError)
  @app.exception_handler(exceptions.RequestValidationError)
  async def explain(_, error):
    problems = "; ".join(f"{each['loc'][-1]}: {each['msg']}" for each in getattr(error, "errors", list)())
    return JSONResponse({"error": problems or str(error)}, 400)

  @app.post("/sample")
  async def sample(request: Request):
    if isinstance(request.prompt, str) and sampler.task.modality != "text":
      raise InputError("The model is not one of texts: give token ids, such as [2], which begins a document.")
    job = Job(request)
    sampler.stream([job.prompt], **job.settings)  # raises InputError; nothing is computed yet
    if len(waiting) >= max_waiting:
      return JSONResponse({"error": "The server is busy: try again later."}, 503)
    waiting.append(job)
    tasks or tasks.add(asyncio.create_task(draw()))
    if request.stream:
      return StreamingResponse(json.dumps(answer) + "\n" async for answer in job.answers())
    return [answer async for answer in job.answers()][-1]

  return app


if __name__ == "__main__":
  parser = argparse.ArgumentParser()
  parser.add_argument("--folder", required=True)
  parser.add_argument("--port", type=int, default=8000)
  sampler = Sampler.from_workdir((flags := parser.parse_args()).folder)
  sampler([np.array([2])], length=1, batch_size=8)  # compiles
  uvicorn.run(create_app(sampler), host="127.0.0.1", port=flags.port)
