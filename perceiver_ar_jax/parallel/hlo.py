"""Reads a compiled module's text: what one device moves to and from HBM and over the interconnect in a run of it.

XLA's own cost analysis takes the body of a loop once; here it counts as often as it runs. An instruction moves what it
reads and writes, but for what lies in on-chip memory; of an array of which it takes or puts a slice, the slice.
"""

import collections
import dataclasses
import functools
import re

_BYTES = {
  "s4": 0.5, "u4": 0.5, "pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2,
  "s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8, "c64": 8,
}  # fmt: skip
_ARRAY = re.compile(r"\b([a-z]+\d*|pred)\[([\d,]*)\](\{[^}]*\})?")
_NAME = re.compile(r"%([\w.-]+)")
# Bytes that a device sends, in multiples of what the collective makes, over groups of n.
_SENT = {
  "all-reduce": lambda n: 2 * (n - 1) / n,
  "all-gather": lambda n: (n - 1) / n,
  "reduce-scatter": lambda n: n - 1,
  "all-to-all": lambda n: (n - 1) / n,
  "collective-permute": lambda n: 1,
  "collective-broadcast": lambda n: 1,
}
_FREE = {
  "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "replica-id", "iota",
  "broadcast", "async-update", "optimization-barrier",
}  # fmt: skip
_NUM_LARGEST = 8
_FREE_CALLS = ("AllocateBuffer", "Bitcast", "AssumeGatherIndicesInBound")


@dataclasses.dataclass(frozen=True)
class _Instruction:
  name: str
  shape: str
  op: str
  operands: tuple[str, ...]
  rest: str
  """Attributes: called computations, replica groups, metadata."""
  root: bool

  @functools.cached_property
  def called(self) -> tuple[str, ...]:
    return tuple(re.findall(r"(?:calls|to_apply|body|condition)=%([\w.-]+)", self.rest))


@dataclasses.dataclass(frozen=True)
class Traffic:
  """What one device moves in one run of the program."""

  hbm_bytes: float
  sent_bytes: float
  """Over the interconnect, one way."""
  collectives: dict[str, float]
  """The same by kind: all-gather, all-reduce, ..."""
  largest: tuple[tuple[int, str], ...]
  """The largest arrays in HBM that the program makes: (bytes, shape and what made it)."""


def traffic(text: str) -> Traffic:
  """What the module `text`, as a compiled jax program's `as_text` gives it, moves on each device."""
  module = _Module(text)
  sent = collections.Counter()
  hbm = module.count(module.entry, 1, sent)
  return Traffic(hbm, sum(sent.values()), dict(sent), module.largest(_NUM_LARGEST))


class _Module:
  def __init__(self, text: str):
    self.computations: dict[str, list[_Instruction]] = {}
    for line in text.splitlines():
      head = re.match(r"(ENTRY )?%([\w.-]+) \(.*\{$", line)
      if head:
        self.computations[head[2]] = body = []
        if head[1]:
          self.entry = head[2]
      elif line.startswith("  ") and " = " in line:
        body.append(_parse(line))
    mesh = re.search(r"num_partitions=(\d+)", text[:200_000])
    self._partitions = int(mesh[1]) if mesh else 1

  def count(self, computation: str, times: float, sent: collections.Counter) -> float:
    """HBM bytes of `times` runs of a computation that is no fusion's; adds to the bytes that are `sent`, by kind."""
    table = self._table(computation)
    total, channels = 0.0, set()
    for instruction in self.computations[computation]:
      op = instruction.op
      self._collectives(instruction, times, sent, channels)
      if op == "while":
        trips = self._trips(instruction)
        body = re.search(r"body=%([\w.-]+)", instruction.rest)[1]
        total += self.count(body, times * trips, sent)
      elif op in ("call", "async-start", "conditional"):
        total += sum(self.count(called, times, sent) for called in instruction.called)
      else:
        total += times * self._moved(instruction, table)
    return total

  def _table(self, computation: str) -> dict[str, _Instruction]:
    return {instruction.name: instruction for instruction in self.computations[computation]}

  def _trips(self, loop: _Instruction) -> int:
    """How often a loop runs: as XLA says; or, for a TPU, its counter starts at 0 and is compared with a constant."""
    if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.rest):
      return int(known[1])
    condition = re.search(r"condition=%([\w.-]+)", loop.rest)[1]
    limits = [
      int(limit[1])
      for instruction in self.computations[condition]
      if instruction.op == "constant" and (limit := re.match(r"\((\d+)\)", instruction.rest))
    ]
    return max(limits, default=1)

  def _collectives(
    self, instruction: _Instruction, times: float, sent: collections.Counter, channels: set, inside: str = ""
  ) -> None:
    """Adds what a collective sends, also one that stands `inside` a fusion's computation.

    One that runs alongside other work stands in several fusions, its start, middle and end, under one channel: it
    counts once. An all-reduce of which each device keeps a part is fused with that, and then is a reduce-scatter.
    """
    kind = instruction.op.removesuffix("-start")
    if kind in _SENT:
      channel = re.search(r"channel_id=(\d+)", instruction.rest)
      if channel and channel[1] in channels:
        return
      channels.add(channel and channel[1])
      size = _group_size(instruction.rest, self._partitions)
      made = _bytes(instruction.shape, hbm_only=False)
      if instruction.op != kind and kind != "all-reduce":  # started: operands are in its shape, too
        made *= {"all-gather": size / (size + 1), "reduce-scatter": 1 / (size + 1)}.get(kind, 1 / 2)
      if kind == "all-reduce" and "reduce-scatter" in inside:
        kind, made = "reduce-scatter", made / size
      sent[kind] += times * made * _SENT[kind](size)
    elif instruction.op in ("fusion", "custom-call"):
      for called in instruction.called:
        for inner in self.computations[called]:
          self._collectives(inner, times, sent, channels, called)

  def _moved(self, instruction: _Instruction, table: dict[str, _Instruction]) -> float:
    """HBM bytes that an instruction which calls nothing but a fusion reads and writes."""
    op = instruction.op
    if (
      op in _FREE
      or op.endswith("-done")
      or (op == "custom-call" and any(free in instruction.rest for free in _FREE_CALLS))
    ):
      return 0.0
    shapes = [table[name].shape for name in instruction.operands if name in table]
    if op in ("copy-start", "slice-start"):  # (destination, source, context)
      made = next(_ARRAY.finditer(instruction.shape))[0]
      source = _bytes(made, hbm_only=False) if shapes and _bytes(shapes[0]) else 0
      return _bytes(made) + source
    if op.removesuffix("-start") in _SENT and op.endswith("-start"):  # its shape has its operands, too
      return _bytes(instruction.shape)
    if op in ("dynamic-slice", "slice", "gather"):
      return 2 * _bytes(instruction.shape)
    if op == "dynamic-update-slice":
      return 2 * _bytes(shapes[1])
    if op == "fusion":
      return self._fusion(instruction, shapes)
    return _bytes(instruction.shape) + sum(map(_bytes, shapes))

  def _fusion(self, fusion: _Instruction, shapes: list[str]) -> float:
    """A fusion reads of each operand what it uses, and writes its results, in place where it updates a slice."""
    body, table = self.computations[fusion.called[0]], self._table(fusion.called[0])
    users = _users(body)
    parameters = {
      int(match[1]): instruction
      for instruction in body
      if instruction.op == "parameter" and (match := re.match(r"\((\d+)\)", instruction.rest))
    }
    total = 0.0
    for index, shape in enumerate(shapes):
      if index in parameters:
        total += min(_bytes(shape), self._read(parameters[index], users, shape))
    root = next(instruction for instruction in body if instruction.root)
    results = [root] if root.op != "tuple" else [table[name] for name in root.operands if name in table]
    outer = [match[0] for match in _ARRAY.finditer(fusion.shape)]
    for result, shape in zip(results, outer):
      while result.op == "bitcast":
        result = table[result.operands[0]]
      if result.op == "dynamic-update-slice" and _bytes(shape):
        total += _bytes(table[result.operands[1]].shape, hbm_only=False)
      else:
        total += _bytes(shape)
    return total

  def _read(self, value: _Instruction, users: dict[str, list[_Instruction]], shape: str) -> float:
    """Bytes of `value` that a fusion reads, of the whole `shape`."""
    total = 0.0
    for user in users[value.name]:
      if user.op == "bitcast":
        total += self._read(user, users, shape)
      elif user.op in ("dynamic-slice", "slice", "gather") and user.operands[0] == value.name:
        total += _bytes(user.shape, hbm_only=False)
      elif user.op == "dynamic-update-slice" and user.operands[0] == value.name:
        continue  # what stays is not touched
      elif user.op == "fusion":
        body, number = self.computations[user.called[0]], user.operands.index(value.name)
        inner = next(i for i in body if i.op == "parameter" and i.rest.startswith(f"({number})"))
        total += self._read(inner, _users(body), shape)
      else:
        return _bytes(shape)
    return total

  def largest(self, count: int) -> tuple[tuple[int, str], ...]:
    """The largest arrays in HBM that instructions make, each shape with an operation once."""
    found = {}
    fused = {c for body in self.computations.values() for i in body if i.op == "fusion" for c in i.called}
    for name, body in self.computations.items():
      for instruction in body if name not in fused else ():
        if instruction.op in _FREE - {"broadcast", "iota"} or instruction.op in ("while", "call", "conditional"):
          continue
        for match in _ARRAY.finditer(instruction.shape):
          size = _bytes(match[0])
          operation = re.search(r'op_name="([^"]*)"', instruction.rest)
          shape = f"{match[1]}[{match[2]}]"
          found.setdefault((int(size), shape), operation[1] if operation else instruction.op)
    ordered = sorted(found.items(), reverse=True)[:count]
    return tuple((size, f"{shape} of {_short(operation)}") for (size, shape), operation in ordered)


def _users(body: list[_Instruction]) -> dict[str, list[_Instruction]]:
  """By name of an instruction those that it is an operand of."""
  users = collections.defaultdict(list)
  for instruction in body:
    for name in instruction.operands:
      users[name].append(instruction)
  return users


def _parse(line: str) -> _Instruction:
  root = line.lstrip().startswith("ROOT ")
  name, _, rest = line.strip().removeprefix("ROOT ").partition(" = ")
  end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
  shape, rest = rest[:end], rest[end:].lstrip()
  op, _, _ = rest.partition("(")
  rest = rest[len(op) :]
  end = _closing(rest, 0)
  operands = tuple(_NAME.findall(rest[: end + 1]))
  return _Instruction(
    name.removeprefix("%"), shape, op.strip(), operands, rest if not operands else rest[end + 1 :], root
  )


def _closing(text: str, start: int) -> int:
  """Index of the parenthesis that closes the one at `start`."""
  depth = 0
  for match in re.compile(r"[()]").finditer(text, start):
    depth += 1 if match[0] == "(" else -1
    if not depth:
      return match.start()
  return len(text) - 1


@functools.lru_cache(maxsize=100_000)
def _bytes(shape: str, hbm_only: bool = True) -> float:
  """Bytes of all arrays of a shape or tuple; with `hbm_only` without those in on-chip memory."""
  total = 0.0
  for kind, sizes, layout in _ARRAY.findall(shape):
    if hbm_only and "S(" in layout:
      continue
    count = 1
    for size in filter(None, sizes.split(",")):
      count *= int(size)
    total += count * _BYTES.get(kind, 0)
  return total


def _group_size(attributes: str, partitions: int) -> int:
  """Devices of each group of a collective."""
  if named := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", attributes):
    sizes = dict(re.findall(r"'(\w+)'=(\d+)", named[1]))
    size = 1
    for axis in re.findall(r"'(\w+)'", named[2]):
      size *= int(sizes[axis])
    return size
  if iota := re.search(r"replica_groups=\[\d+,(\d+)\]", attributes):
    return int(iota[1])
  if listed := re.search(r"replica_groups=\{\{([\d,]*)\}", attributes):
    return listed[1].count(",") + 1
  return partitions


def _short(operation: str) -> str:
  """The telling end of an operation's name."""
  return "/".join(operation.split("/")[-4:])
