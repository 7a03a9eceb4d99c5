"""Perceiver AR (Hawthorne et al., 2022, arXiv 2202.07765) in PyTorch, for weights exported from perceiver_ar_jax.

    import perceiver_ar_torch                            # this file alone, with torch and safetensors
    model = perceiver_ar_torch.load("FOLDER")            # config.json and model.safetensors
    logits_BxMxV = model(tokens_BxL, positions_BxLxP)    # or with num_latents=M; positions may be None
    tokens_BxN = model.generate(tokens_BxL, 100, temperature=0.9, top_k=40)

Tokens are int64, right-aligned: 0 is padding, on the left; 1 ends a sequence, 2 starts it. Computes in float32 as the
JAX model does, without dropout. Names of modules and parameters are those of the file.
Shapes: B batch, L context, M latents, V vocabulary, E and D widths, H heads, K head width, P position dimensions.
"""

import json
import math

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn import functional as F

# All settings of a model; others could change its results.
_SETTINGS = """architecture vocab_size max_context num_latents num_layers latent_width embed_width num_cross_heads
  cross_attend_width num_self_heads mlp_widening activation position_encoding position_sizes positions_from_data
  rotary_fraction rotary_max_wavelength rotary_axes conv_taps qk_norm value_features cross_attend_after segment memory
  zero_init dropout latent_dropout cross_attend_dropout attention attention_chunk logits_chunk remat dtype""".split()
_ENCODINGS = {"rotary", "sinusoidal", "fourier", "learned"}


def load(folder: str) -> "PerceiverAR":
  """Returns the model of a folder; damaged or unsupported: ValueError, RuntimeError or safetensors.SafetensorError."""
  with open(f"{folder}/config.json", encoding="utf-8") as file:
    model = PerceiverAR(json.load(file)["model"])
  model.load_state_dict(safetensors.torch.load_file(f"{folder}/model.safetensors"))
  return model.eval().requires_grad_(False)


class Dense(nn.Module):  # x @ kernel + bias; the kernel is [in, out]
  def __init__(self, inputs: int, outputs: int):
    super().__init__()
    self.kernel, self.bias = nn.Parameter(torch.zeros(inputs, outputs)), nn.Parameter(torch.zeros(outputs))

  def forward(self, x: Tensor) -> Tensor:
    return x @ self.kernel + self.bias


class Norm(nn.Module):  # layer or, without a bias, RMS normalization
  def __init__(self, width: int, bias: bool = True):
    super().__init__()
    self.scale, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width)) if bias else None

  def forward(self, x: Tensor) -> Tensor:
    if self.bias is None:
      return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * self.scale
    return F.layer_norm(x, self.scale.shape, self.scale, self.bias, eps=1e-5)


class Embed(nn.Module):  # token embeddings plus the tables of each position dimension
  def __init__(self, config: dict):
    super().__init__()
    width, added = config["embed_width"] or config["latent_width"], {"sinusoidal", "fourier", "learned"}
    self.tokens, count = nn.Parameter(torch.zeros(config["vocab_size"], width)), config.get("value_features", 0)
    self.register_buffer("features", _value_features(config["vocab_size"], count), persistent=False)
    self.values = nn.ParameterDict({"kernel": torch.zeros(count, width)} if count else {})
    self.encoding = next(iter(added & set(config["position_encoding"].split("+"))), None)
    self.sizes = config["position_sizes"] if self.encoding else ()
    if self.encoding == "learned":
      for dimension, size in enumerate(self.sizes):
        self.register_parameter(f"position_{dimension}", nn.Parameter(torch.zeros(size, width)))

  def forward(self, tokens_BxL: Tensor, positions_BxLxP: Tensor) -> Tensor:
    x_BxLxE = (self.tokens + self.features @ self.values["kernel"] if self.values else self.tokens)[tokens_BxL]
    for dimension, size in enumerate(self.sizes):
      positions_BxL, width = positions_BxLxP[..., dimension], x_BxLxE.shape[-1]
      if self.encoding == "learned":
        x_BxLxE = x_BxLxE + getattr(self, f"position_{dimension}")[positions_BxL]
      else:
        x_BxLxE = x_BxLxE + _waves(self.encoding, positions_BxL, size, width).to(x_BxLxE)
    return x_BxLxE


def _geometric(first: float, last: float, count: int) -> Tensor:  # float64
  return torch.linspace(math.log(first), math.log(last), count, dtype=torch.float64).exp()


def _value_features(size: int, count: int) -> Tensor:  # [V, count]: sines and cosines of each id's value
  values_Vx1 = torch.arange(-3.0, size - 3, dtype=torch.float64)[:, None]  # the first three ids have none
  angles = values_Vx1 * _geometric(math.pi / size, math.pi / 2, count // 2)
  return (torch.cat([angles.sin(), angles.cos()], -1) * math.sqrt(2) * (values_Vx1 >= 0)).float()


def _waves(encoding: str, positions_BxL: Tensor, size: int, width: int) -> Tensor:  # float64[B, L, width]
  positions_BxLx1, frequencies = positions_BxL[..., None].double(), _geometric(1, 1e-4, width // 2)
  if encoding == "fourier":
    frequencies = torch.linspace(1.0, size / 2, width // 2, dtype=torch.float64) * math.pi
    positions_BxLx1 = positions_BxLx1 * (2 / max(size - 1, 1)) - 1
  angles = positions_BxLx1 * frequencies.to(positions_BxLx1)
  return F.pad(torch.cat([angles.sin(), angles.cos()], -1), (0, width % 2))


def _rotate(config: dict, x_BxLxHxK: Tensor, positions_BxLxP: Tensor) -> Tensor:
  # Rotates the leading interleaved pairs of queries or keys by position * frequency, in float32.
  if "rotary" not in config["position_encoding"].split("+"):
    return x_BxLxHxK
  axes, width = config["rotary_axes"], x_BxLxHxK.shape[-1]
  if axes:
    bands = [int(width * fraction / 2) for fraction, _, _ in axes]
    frequencies = 2 * math.pi / torch.cat([_geometric(a, b, n) for n, (_, a, b) in zip(bands, axes)])
  else:
    bands = [int(width * config["rotary_fraction"] / 2)]  # exponents up to 1 inclusive; common is one band short of 1
    exponents = torch.linspace(0, 1, bands[0], dtype=torch.float64)
    frequencies = (config["rotary_max_wavelength"] or config["max_context"]) ** -exponents
  positions = [positions_BxLxP[..., i : i + 1].expand(*positions_BxLxP.shape[:2], n) for i, n in enumerate(bands)]
  angles_BxLx1xN = (torch.cat(positions, -1).float() * frequencies.to(x_BxLxHxK))[:, :, None]
  cos, sin = angles_BxLx1xN.cos(), angles_BxLx1xN.sin()
  head, rest = x_BxLxHxK.split([2 * sum(bands), width - 2 * sum(bands)], -1)
  even, odd = head[..., 0::2], head[..., 1::2]
  return torch.cat([torch.stack([even * cos - odd * sin, odd * cos + even * sin], -1).flatten(-2), rest], -1)


class Attention(nn.Module):  # causal attention: queries are at the last M of the L slots of the keys
  def __init__(self, config: dict, width: int, heads: int):
    super().__init__()
    self.config, self.heads = config, heads
    self.query, self.out = Dense(config["latent_width"], width), Dense(width, config["latent_width"])
    self.norm_query = Norm(width // heads, bias=False) if config["qk_norm"] else nn.Identity()

  def forward(self, x_BxMxD: Tensor, positions_BxMxP: Tensor, keys_values: list[Tensor], valid_BxL: Tensor) -> Tensor:
    k_BxLxHxK, v_BxLxHxK = keys_values
    q_BxMxHxK = self.norm_query(self.query(x_BxMxD).unflatten(-1, (self.heads, -1)))
    q_BxMxHxK = _rotate(self.config, q_BxMxHxK, positions_BxMxP) * q_BxMxHxK.shape[-1] ** -0.5
    scores_BxHxMxL = torch.einsum("bmhk,blhk->bhml", q_BxMxHxK, k_BxLxHxK)
    causal_MxL = torch.ones_like(scores_BxHxMxL[0, 0], dtype=torch.bool).tril(valid_BxL.shape[1] - x_BxMxD.shape[1])
    weights_BxHxMxL = scores_BxHxMxL.masked_fill(~(causal_MxL & valid_BxL[:, None, None]), -1e30).softmax(-1)
    return self.out(torch.einsum("bhml,blhk->bmhk", weights_BxHxMxL, v_BxLxHxK).flatten(-2))


class Block(nn.Module):  # the parts of both kinds of blocks: attention to something of width `inputs`, and an MLP
  def __init__(self, config: dict, inputs: int, width: int, heads: int):
    super().__init__()
    self.config, self.heads, latent_width = config, heads, config["latent_width"]
    self.keys_values = nn.ModuleDict({name: Dense(inputs, width) for name in ("key", "value")})
    self.norm_key = Norm(width // heads, bias=False) if config["qk_norm"] else nn.Identity()
    self.attention, self.norm_mlp, hidden = Attention(config, width, heads), Norm(latent_width), config["mlp_widening"]
    self.mlp = nn.ModuleDict({"up": Dense(latent_width, hidden * latent_width)})
    self.mlp["down"] = Dense(hidden * latent_width, latent_width)

  def project(self, x_BxLxE: Tensor) -> list[Tensor]:  # to keys and values, not yet normalized and rotated
    return [dense(x_BxLxE).unflatten(-1, (self.heads, -1)) for dense in self.keys_values.values()]

  def add(self, x_BxMxD: Tensor, attended_BxMxD: Tensor) -> Tensor:  # both residuals
    x_BxMxD = x_BxMxD + attended_BxMxD
    hidden = self.mlp["up"](self.norm_mlp(x_BxMxD))
    hidden = F.gelu(hidden, approximate="tanh") if self.config["activation"] == "gelu" else F.relu(hidden).square()
    return x_BxMxD + self.mlp["down"](hidden)


class CrossAttention(Block):  # from the latents to all inputs
  def __init__(self, config: dict):
    latent_width, heads = config["latent_width"], config["num_cross_heads"]
    inputs, width = config["embed_width"] or latent_width, config["cross_attend_width"] or latent_width
    super().__init__(config, inputs, width, heads)
    self.norm_query, self.norm_inputs = Norm(latent_width), Norm(inputs)
    shape, names = (config["conv_taps"], heads, width // heads), self.keys_values if config["conv_taps"] else ()
    self.conv = nn.ParameterDict({name: torch.zeros(shape) for name in names})

  def keys(self, x_BxLxE: Tensor, positions_BxLxP: Tensor, valid_BxL: Tensor) -> list[Tensor]:
    keys_values = self.project(self.norm_inputs(x_BxLxE))
    for index, weights_TxHxK in enumerate(self.conv.values()):  # adds to each slot the T slots before it
      x_BxLxHxK = keys_values[index] * valid_BxL[..., None, None]
      shifted = (F.pad(x_BxLxHxK, (0, 0, 0, 0, tap, 0))[:, :-tap] for tap in range(1, len(weights_TxHxK) + 1))
      keys_values[index] = x_BxLxHxK + sum(x * weights for x, weights in zip(shifted, weights_TxHxK))
    return [_rotate(self.config, self.norm_key(keys_values[0]), positions_BxLxP), keys_values[1]]

  def forward(self, x_BxMxD: Tensor, positions_BxMxP: Tensor, keys_values: list[Tensor], valid_BxL: Tensor) -> Tensor:
    return self.add(x_BxMxD, self.attention(self.norm_query(x_BxMxD), positions_BxMxP, keys_values, valid_BxL))


class SelfAttentionLayer(Block):  # also returns the keys and values of all S latents: those cached and the new ones
  def __init__(self, config: dict):
    super().__init__(config, config["latent_width"], config["latent_width"], config["num_self_heads"])
    self.norm_attention = Norm(config["latent_width"])

  def forward(self, x_BxMxD: Tensor, positions_BxMxP: Tensor, cached: list[Tensor] | None, valid_BxS: Tensor):
    normed_BxMxD = self.norm_attention(x_BxMxD)
    keys_values = self.project(normed_BxMxD)
    keys_values[0] = _rotate(self.config, self.norm_key(keys_values[0]), positions_BxMxP)
    keys_values = [torch.cat(pair, 1) for pair in zip(cached, keys_values)] if cached else keys_values
    return self.add(x_BxMxD, self.attention(normed_BxMxD, positions_BxMxP, keys_values, valid_BxS)), keys_values


class PerceiverAR(nn.Module):
  """The model of the settings `config`, "model" in config.json; raises ValueError for those of other models."""

  def __init__(self, config: dict):
    super().__init__()
    unknown = {name: value for name, value in config.items() if value and name not in _SETTINGS}
    if not _ENCODINGS.issuperset(config["position_encoding"].split("+")):
      unknown["position_encoding"] = config["position_encoding"]
    if unknown or config["architecture"] != "perceiver_ar":
      raise ValueError(f"Settings of another model or a newer version: {config['architecture']}, {unknown}.")
    self.config, width = config, config["latent_width"]
    self.cross_before = [0, *sorted({layer + 1 for layer in config["cross_attend_after"]})]
    self.embed, self.to_latents = Embed(config), Dense(config["embed_width"] or width, width)
    self.cross_attend = nn.ModuleList(CrossAttention(config) for _ in self.cross_before)
    self.layers = nn.ModuleList(SelfAttentionLayer(config) for _ in range(config["num_layers"]))
    self.final_norm, self.to_logits = Norm(width), Dense(width, config["vocab_size"])
    self.value_logits = nn.ModuleDict(
      {"project": Dense(width, len(self.embed.features.T))} if self.embed.values else {}
    )

  def forward(self, tokens_BxL: Tensor, positions_BxLxP=None, num_latents: int | None = None) -> Tensor:
    """Returns logits_BxMxV for the token after each of the last M slots; M is at most the number of inputs.

    Positions are 1-based, 0 on padding. None, or the setting positions_from_data=False: distances from the last token.
    """
    num_latents = num_latents or self.config["num_latents"]
    if num_latents > tokens_BxL.shape[1]:
      raise ValueError(f"num_latents={num_latents} exceeds the {tokens_BxL.shape[1]} inputs.")
    if positions_BxLxP is None or not self.config["positions_from_data"]:
      distances_L = torch.arange(tokens_BxL.shape[1] - 1, -1, -1, device=tokens_BxL.device)
      positions_BxLxP = ((tokens_BxL > 0) * distances_L)[..., None]
    inputs = tokens_BxL, positions_BxLxP
    return self._logits(*inputs, num_latents, self._cross_keys(*inputs), [None] * len(self.layers))

  def _cross_keys(self, tokens_BxL: Tensor, positions_BxLxP: Tensor) -> list[list[Tensor]]:
    dimensions = len(self.embed.sizes or self.config["rotary_axes"]) or 1
    if positions_BxLxP.shape[-1] != dimensions:
      raise ValueError(f"Positions have {positions_BxLxP.shape[-1]} dimensions, and the model has {dimensions}.")
    x_BxLxE = self.embed(tokens_BxL, positions_BxLxP)
    return [cross_attend.keys(x_BxLxE, positions_BxLxP, tokens_BxL > 0) for cross_attend in self.cross_attend]

  def _logits(self, tokens_BxL: Tensor, positions_BxLxP: Tensor, num_new: int, cross_keys: list, cache: list) -> Tensor:
    """Logits of the last `num_new` slots; `cache` has the keys and values of the latents before, and is updated."""
    positions_BxMxP, groups = positions_BxLxP[:, -num_new:], iter(zip(self.cross_attend, cross_keys))
    num_latents = num_new + (cache[0][0].shape[1] if cache and cache[0] else 0)
    valid_BxL = tokens_BxL > 0
    x_BxMxD = self.to_latents(self.embed(tokens_BxL[:, -num_new:], positions_BxMxP))
    for index in range(len(self.layers) + 1):
      if index in self.cross_before:
        cross_attend, keys_values = next(groups)
        x_BxMxD = cross_attend(x_BxMxD, positions_BxMxP, keys_values, valid_BxL)
      if index < len(self.layers):
        x_BxMxD, cache[index] = self.layers[index](x_BxMxD, positions_BxMxP, cache[index], valid_BxL[:, -num_latents:])
    x_BxMxD = self.final_norm(x_BxMxD)
    by_value = [project(x_BxMxD) @ self.embed.features.T for project in self.value_logits.values()]
    return sum(by_value, self.to_logits(x_BxMxD))

  @torch.no_grad()
  def generate(
    self, tokens_BxL, max_new_tokens, temperature=1.0, top_k=0, top_p=1.0, positions=None, kept_latents=None, cache=True
  ) -> Tensor:
    """Returns tokens_BxN: the prompts with up to `max_new_tokens` more; padding follows the end of a sequence (1).

    A pass over the newest `kept_latents` (None: 7/8 of M) begins a block of tokens, each of which adds a latent until
    there are M; a full context starts over from its newest 7/8. With or without `cache`, the logits are the same.
    `positions` are int64[B, L + max_new_tokens, P]; None: 1, 2, ... from the start of the context.
    """
    context, most, taps = (self.config[name] for name in ("max_context", "num_latents", "conv_taps"))
    kept = min(kept_latents or max(most - most // 8, 1), most)
    cache = cache and (self.config["positions_from_data"] or not self.embed.encoding)  # or all positions always change
    tokens, start, num_latents, keys, layers = tokens_BxL, max(tokens_BxL.shape[1] - context, 0), 0, [], []
    ended_B = torch.zeros_like(tokens[:, 0], dtype=torch.bool)
    while (length := tokens.shape[1]) < tokens_BxL.shape[1] + max_new_tokens and not ended_B.all():
      if length - start > context:
        start, num_latents, keys = length - max(context - context // 8, 1), 0, []
      is_new = num_latents in (0, most)
      num_latents = min(kept, length - start) if is_new else num_latents + 1
      window, positions_BxLxP = tokens[:, start:], self._positions(tokens, positions, start)
      if cache:
        if keys:  # of the newest token, which the convolution computes from those before it
          newest = self._cross_keys(window[:, -taps - 1 :], positions_BxLxP[:, -taps - 1 :])
          keys = [[torch.cat([old, new[:, -1:]], 1) for old, new in zip(*pair)] for pair in zip(keys, newest)]
        keys = keys or self._cross_keys(window, positions_BxLxP)
        layers = [None] * len(self.layers) if is_new else layers
        logits_BxV = self._logits(window, positions_BxLxP, num_latents if is_new else 1, keys, layers)[:, -1]
      else:
        logits_BxV = self(window, positions_BxLxP, num_latents)[:, -1]
      token_B = _draw(logits_BxV, temperature, top_k, top_p).masked_fill(ended_B, 0)
      tokens, ended_B = torch.cat([tokens, token_B[:, None]], 1), ended_B | (token_B == 1)
    return tokens

  def _positions(self, tokens_BxN: Tensor, positions_BxNxP: Tensor | None, start: int) -> Tensor:  # from `start` on
    valid_BxL = tokens_BxN[:, start:] > 0
    if not self.config["positions_from_data"]:  # for rotary positions only differences matter
      return -torch.arange(valid_BxL.shape[1], device=valid_BxL.device).expand_as(valid_BxL)[..., None]
    if positions_BxNxP is not None:
      return positions_BxNxP[:, start : tokens_BxN.shape[1]] * valid_BxL[..., None]
    return (valid_BxL.cumsum(1) * valid_BxL).clamp(max=min(self.embed.sizes or [2**62]) - 1)[..., None]


def _draw(logits_BxV: Tensor, temperature: float, top_k: int, top_p: float) -> Tensor:
  """One token of each row, never padding (0) or a start (2); temperature 0 chooses the most likely."""
  logits_BxV = logits_BxV.index_fill(1, torch.tensor([0, 2], device=logits_BxV.device), -math.inf)
  if temperature == 0:
    return logits_BxV.argmax(-1)
  logits_BxV = logits_BxV / temperature
  ranked_BxV = logits_BxV.sort(descending=True).values
  ranked_BxV[:, top_k or ranked_BxV.shape[1] :] = -math.inf
  probabilities_BxV = ranked_BxV.softmax(-1)
  drawable_BxV = (probabilities_BxV.cumsum(-1) - probabilities_BxV < top_p) & ranked_BxV.isfinite()
  least_Bx1 = ranked_BxV.masked_fill(~drawable_BxV, math.inf).amin(-1, keepdim=True)
  return logits_BxV.masked_fill(logits_BxV < least_Bx1, -math.inf).softmax(-1).multinomial(1)[:, 0]
