"""Launch scripts: the exact calls they make, seen by stand-ins for gcloud, kubectl and srun; local.sh runs for real."""

import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import pytest
import yaml

from tests import tiny

pytestmark = pytest.mark.slow

LAUNCH = tiny.ROOT / "launch"
STAND_IN = f"""#!{sys.executable}
import json, os, pathlib, sys
folder = pathlib.Path(__file__).parent
name, arguments = pathlib.Path(__file__).name, sys.argv[1:]
stdin = sys.stdin.read() if "-" in arguments else ""
with open(folder / "calls", "a") as calls:
  calls.write(json.dumps([name, *arguments] + ([stdin] if stdin else [])) + "\\n")
replies = json.loads((folder / "replies").read_text())
for words, answers in replies.items():
  if set(words.split()) <= set([name, *arguments]) and answers:
    output, code = answers.pop(0)
    (folder / "replies").write_text(json.dumps(replies))
    print(output)
    sys.exit(code)
"""
ARGUMENTS = ["--config=configs/imagenet64.py", "--workdir=gs://bucket/a run"]


@pytest.fixture
def launch(tmp_path):
  """Runs a script with stand-ins first on PATH: (result, calls). `replies`: words of a call -> [output, code]s."""
  folder = tmp_path / "bin"
  folder.mkdir()
  for name in ("gcloud", "kubectl", "srun", "scontrol"):
    (folder / name).write_text(STAND_IN)
    (folder / name).chmod(0o755)

  def run(script, *arguments, replies=None, **environment):
    (folder / "replies").write_text(json.dumps(replies or {}))
    (folder / "calls").write_text("")
    result = subprocess.run(
      ["bash", str(LAUNCH / script), *arguments] if script.endswith("sbatch") else [str(LAUNCH / script), *arguments],
      env=os.environ | {"PATH": f"{folder}:{os.environ['PATH']}"} | environment,
      capture_output=True,
      text=True,
      timeout=60,
    )
    return result, [json.loads(line) for line in (folder / "calls").read_text().splitlines()]

  return run


SLICE = {"NAME": "run1", "ZONE": "us-central2-b", "TYPE": "v4-256", "POLL_SECONDS": "0"}
WHERE = ["--zone=us-central2-b"]
TPU = ["gcloud", "compute", "tpus"]
MACHINE = ["--accelerator-type=v4-256", "--runtime-version=tpu-ubuntu2204-base"]
CREATE = [*TPU, "tpu-vm", "create", "run1", *MACHINE, *WHERE]
DELETE = [*TPU, "tpu-vm", "delete", "run1", "--quiet", *WHERE]
DESCRIBE = [*TPU, "tpu-vm", "describe", "run1", "--format=value(state)", *WHERE]


def _ssh(worker, command):
  return [*TPU, "tpu-vm", "ssh", "run1", f"--worker={worker}", f"--command={command}", *WHERE]


def test_tpu_vm_makes_and_deletes_a_slice(launch):
  assert launch("tpu_vm.sh", "create", **SLICE)[1] == [CREATE]
  _, calls = launch("tpu_vm.sh", "create", **SLICE, SPOT="1", PROJECT="p", VERSION="v")
  assert calls == [
    [
      *TPU,
      "tpu-vm",
      "create",
      "run1",
      "--accelerator-type=v4-256",
      "--runtime-version=v",
      "--spot",
      *WHERE,
      "--project=p",
    ]
  ]
  assert launch("tpu_vm.sh", "delete", **SLICE)[1] == [DELETE]
  assert launch("tpu_vm.sh", "stop", **SLICE)[1] == [_ssh("all", "kill -TERM $(cat perceiver_ar_jax/pid)")]
  assert launch("tpu_vm.sh", "logs", "3", **SLICE)[1] == [_ssh(3, "tail -n 100 -F perceiver_ar_jax/train.log")]


def test_tpu_vm_waits_in_the_queue(launch):
  queued = [*TPU, "queued-resources"]
  asked = [*queued, "describe", "run1", "--format=value(state.state)", *WHERE]
  states = {"queued-resources describe": [("WAITING_FOR_RESOURCES", 0), ("PROVISIONING", 0), ("ACTIVE", 0)]}
  result, calls = launch("tpu_vm.sh", "create", replies=states, **SLICE, QUEUED="1")
  assert result.returncode == 0, result.stderr
  assert calls == [[*queued, "create", "run1", "--node-id=run1", *MACHINE, *WHERE], asked, asked, asked]
  result, _ = launch("tpu_vm.sh", "create", replies={"describe": [("FAILED", 0)]}, **SLICE, QUEUED="1")
  assert result.returncode == 1 and "failed (FAILED)" in result.stderr
  assert launch("tpu_vm.sh", "delete", **SLICE, QUEUED="1")[1] == [
    [*queued, "delete", "run1", "--force", "--quiet", *WHERE]
  ]


def test_tpu_vm_sets_up_this_commit_on_all_workers(launch):
  result, (copy, install) = launch("tpu_vm.sh", "setup", **SLICE)
  assert result.returncode == 0, result.stderr
  assert copy[:4] == [*TPU, "tpu-vm"] and copy[6:] == ["run1:", "--worker=all", *WHERE]
  assert copy[4] == "scp" and copy[5].endswith("/perceiver_ar_jax.tar.gz")
  assert install[:6] == _ssh("all", "")[:6] and "--editable '.[tpu]'" in install[-2]
  script = install[-2].removeprefix("--command=")
  assert subprocess.run(["bash", "-n"], input=script, text=True).returncode == 0


def test_what_tpu_vm_runs_on_a_worker_remembers_pid_log_and_exit_code(launch, tmp_path):
  """The command that goes over ssh, run here: arguments arrive whole, and a second run is refused."""
  _, ((*_, command, _),) = launch("tpu_vm.sh", "run", *ARGUMENTS, **SLICE)
  python = tmp_path / "perceiver_ar_jax" / ".venv" / "bin" / "python"
  python.parent.mkdir(parents=True)
  python.write_text('#!/bin/sh\nprintf "%s|" "$@"\nwhile [ ! -e end ]; do sleep 0.05; done\nexit 5\n')
  python.chmod(0o755)
  folder, shell = tmp_path / "perceiver_ar_jax", ["bash", "-c", command.removeprefix("--command=")]
  assert subprocess.run(shell, cwd=tmp_path).returncode == 0
  _until((folder / "pid").exists)
  again = subprocess.run(shell, cwd=tmp_path, capture_output=True, text=True)
  assert again.returncode == 1 and "running already" in again.stdout
  (folder / "end").touch()
  _until((folder / "exit_code").exists)
  assert (folder / "exit_code").read_text() == "5\n"
  assert (folder / "train.log").read_text() == f"-m|perceiver_ar_jax.main|{ARGUMENTS[0]}|{ARGUMENTS[1]}|"


def test_tpu_vm_keeps_a_run_going_until_it_is_done(launch):
  """The slice is created, preempted and created again; the run dies, resumes and finishes."""
  states = ["", "READY", "PREEMPTED", "READY", "READY"]
  codes = ["", "137", "0"]
  replies = {
    "describe": [(state, 0 if state else 1) for state in states],
    "ssh --worker=0": [(code, 0) for code in codes],
  }
  result, calls = launch("tpu_vm.sh", "keep", *ARGUMENTS, replies=replies, **SLICE)
  assert result.returncode == 0, result.stderr
  seen = [call[4] + (call[6] if call[4] == "ssh" else "") for call in calls]
  created = ["create", "scp", "ssh--worker=all", "ssh--worker=all"]
  asked = ["describe", "ssh--worker=0"]
  assert seen == ["describe", *created, *asked, "describe", "delete", *created, *asked, "ssh--worker=all", *asked]
  assert calls[0] == DESCRIBE and calls[1] == CREATE and DELETE in calls
  replies = {"describe": [("READY", 0)], "ssh": [("1", 0)]}
  result, _ = launch("tpu_vm.sh", "keep", *ARGUMENTS, replies=replies, **SLICE)
  assert result.returncode == 1 and "exit code 1" in result.stderr


def test_gke_applies_a_manifest_for_the_slice(launch):
  run = {"NAME": "run1", "IMAGE": "registry/image:1&2", "SLICE": "v5e:16x16"}
  result, ((*command, manifest),) = launch("gke.sh", "apply", *ARGUMENTS, **run)
  assert result.returncode == 0, result.stderr
  assert command == ["kubectl", "apply", "-f", "-"]
  assert "@" not in manifest
  jobset = yaml.safe_load(manifest)
  assert (jobset["kind"], jobset["metadata"]["name"]) == ("JobSet", "run1")
  job = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
  assert (job["parallelism"], job["completions"]) == (64, 64)  # hosts
  pod = job["template"]["spec"]
  assert pod["nodeSelector"] == {
    "cloud.google.com/gke-tpu-accelerator": "tpu-v5-lite-podslice",
    "cloud.google.com/gke-tpu-topology": "16x16",
  }
  (container,) = pod["containers"]
  assert (container["image"], container["args"]) == ("registry/image:1&2", ARGUMENTS)
  assert container["resources"]["limits"] == {"google.com/tpu": 4}
  assert launch("gke.sh", "delete", **run)[1] == [["kubectl", "delete", "jobset", "run1"]]
  selector = "jobset.sigs.k8s.io/jobset-name=run1,batch.kubernetes.io/job-completion-index=0"
  assert launch("gke.sh", "logs", **run)[1] == [["kubectl", "logs", "--follow", f"--selector={selector}"]]
  wrong = launch("gke.sh", "apply", *ARGUMENTS, **run | {"SLICE": "v5e"})[0]
  assert wrong.returncode == 1 and "has no shape" in wrong.stderr


@pytest.mark.parametrize(("code", "requeued"), [(0, False), (1, False), (143, True)])
def test_slurm_starts_a_process_for_each_gpu_and_requeues_what_can_go_on(launch, code, requeued):
  slurm = {"SLURM_JOB_ID": "12", "SLURM_SUBMIT_DIR": str(tiny.ROOT)}
  result, calls = launch("slurm.sbatch", *ARGUMENTS, replies={"srun": [("", code)]}, **slurm)
  assert result.returncode == code
  python = [".venv/bin/python", "-m", "perceiver_ar_jax.main"]
  assert calls[0] == ["srun", "--kill-on-bad-exit=1", "--label", *python, *ARGUMENTS]
  assert calls[1:] == ([["scontrol", "requeue", "12"]] if requeued else [])


def test_slurm_directives_stand_before_the_first_command():
  lines = (LAUNCH / "slurm.sbatch").read_text().splitlines()
  directives = [index for index, line in enumerate(lines) if line.startswith("#SBATCH ")]
  assert directives and all(line.startswith("#") for line in lines[: directives[-1]])
  options = [lines[index].split(" ", 1)[1] for index in directives]
  assert {"--ntasks-per-node=8", "--gpus-per-node=8", "--signal=TERM@300", "--requeue"} <= set(options)


# Process 1 of "fail" ends with code 7 once two others run; all others end by a signal, which they name.
PROCESS = """#!/usr/bin/env bash
echo "$*"
[[ $* == *ends* ]] && exit 0
if [[ $* == *fail*--process_id=1* ]]; then
  until [[ $(ls "$0".ready.* 2> /dev/null | wc -l) -ge 2 ]]; do sleep 0.05; done
  exit 7
fi
trap 'echo TERM; sleep 0.3; exit 143' TERM
trap 'echo INT; sleep 0.3; exit 130' INT
touch "$0.ready.$$"
echo ready
for ((i = 0; i < 600; i++)); do sleep 0.1; done
"""


@pytest.fixture
def local(tmp_path):
  """Starts local.sh with a stand-in for Python."""
  python = tmp_path / "python"
  python.write_text(PROCESS)
  python.chmod(0o755)

  def start(*arguments):
    environment = os.environ | {"PYTHON": str(python), "PORT": "12345"}
    command = [str(LAUNCH / "local.sh"), *arguments]
    # Where tests themselves run in the background, SIGINT is ignored, and a shell cannot undo what it inherits.
    before = signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
      return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    finally:
      signal.signal(signal.SIGINT, before)

  return start


def test_local_runs_processes_that_know_their_number(local):
  process = local("3", "--mode=ends", "--workdir=a b")
  output, _ = process.communicate(timeout=30)
  assert process.returncode == 0
  told = "-m perceiver_ar_jax.main --mode=ends --workdir=a b --coordinator=127.0.0.1:12345"
  assert sorted(output.splitlines()) == [f"[{i}] {told} --process_id={i} --num_processes=3" for i in range(3)]


def test_local_ends_the_others_when_one_fails(local):
  process = local("3", "--mode=fail")
  output, _ = process.communicate(timeout=30)
  assert process.returncode == 7
  assert "Process 1 ended with code 7; ending the other 2." in output
  assert {"[0] TERM", "[2] TERM"} <= set(output.splitlines())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["TERM", "INT"])
def test_local_passes_a_signal_on_once(local, number):
  process = local("2", "--mode=train")
  lines = []
  while sum("ready" in line for line in lines) < 2:
    lines.append(process.stdout.readline())
  process.send_signal(number)
  output, _ = process.communicate(timeout=30)
  assert process.returncode == 128 + number
  name = number.name.removeprefix("SIG")
  assert sorted(re.findall(r"\[\d\] (?:TERM|INT)", output)) == [f"[0] {name}", f"[1] {name}"]


def test_local_wants_a_number(local):
  process = local("--config=configs/copy.py")
  output, _ = process.communicate(timeout=30)
  assert process.returncode == 1 and "Usage" in output


def _until(condition, seconds: float = 20.0):
  end = time.monotonic() + seconds
  while not condition():
    assert time.monotonic() < end, "waited in vain"
    time.sleep(0.02)


def test_the_images_files_exist():
  """What the Dockerfile copies is there, and its .dockerignore lets it in."""
  let_in = {line[1:] for line in (LAUNCH / "Dockerfile.dockerignore").read_text().splitlines() if line.startswith("!")}
  copied = re.findall(r"^COPY (.+) \S+$", (LAUNCH / "Dockerfile").read_text(), re.MULTILINE)
  names = {name for line in copied for name in line.split()}
  assert names == let_in and all((pathlib.Path(tiny.ROOT) / name).exists() for name in names)
