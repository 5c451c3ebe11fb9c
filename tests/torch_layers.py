"""Layers that the tests of moegen.torch share, and what they compute in plain torch, differentiably and in any type."""

from __future__ import annotations

import fcntl
import json
import pathlib

import torch
from helpers import run_python
from torch.nn import functional

import moegen

# Between them: shared expert and its gate, capacity, biases, clamps, correction bias, groups, weights on the input, two types.
CONFIGS = {
    "shared": moegen.MoEConfig(
        experts=6, top_k=3, hidden=16, intermediate=20, shared_intermediate=12, shared_gate=True, capacity_factor=0.8,
        renormalize=False,
    ),
    "biased": moegen.MoEConfig(
        experts=4, top_k=2, hidden=16, intermediate=20, gating="topk_softmax", expert_bias=True, router_bias=True,
        activation="swiglu_clamped", swiglu_limit=0.5, dtype="bfloat16",
    ),
    "grouped": moegen.MoEConfig(
        experts=8, top_k=2, hidden=16, intermediate=20, gating="sigmoid", correction_bias=True, n_group=4, topk_group=2,
        routed_scaling=2.5, shared_intermediate=8, activation="relu2", weight_on_input=True,
    ),
}  # fmt: skip

_BUILD = """
import json, pathlib, sys
from helpers import built_with
from moegen import MoEConfig

given = json.load(sys.stdin)
store, configs = pathlib.Path(given["store"]), [MoEConfig.from_dict(fields) for fields in given["configs"]]
print(json.dumps([str(built_with(store, config, max_rows=1).path) for config in configs]))
"""


def build_apart(store: pathlib.Path) -> dict[str, str]:
    """Name -> artifact's folder: built in a process without torch, once for all workers of pytest-xdist."""
    store.mkdir(parents=True, exist_ok=True)
    known = store / "paths.json"
    with open(store / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not known.exists():
            given = {"store": str(store), "configs": [config.to_dict() for config in CONFIGS.values()]}
            done = run_python(_BUILD, given=json.dumps(given), timeout=600)
            assert done.returncode == 0, done.stderr
            known.write_text(json.dumps(dict(zip(CONFIGS, json.loads(done.stdout), strict=True))))
    return json.loads(known.read_text())


def dense(config, weights, x, ids, kept, router_x=None):
    """The layer for given choices: every expert computes every token, and masks do the rest; autograd can follow."""
    z = (x if router_x is None else router_x) @ weights["router.weight"].T + weights.get("router.bias", 0)
    if config.gating == "topk_softmax":
        factors = torch.softmax(z.gather(1, ids), 1)
    else:
        factors = (torch.softmax(z, 1) if config.gating == "softmax" else torch.sigmoid(z)).gather(1, ids)
        if config.renormalize:
            factors = factors / factors.sum(1, keepdim=True)
    factors = factors * config.routed_scaling
    y = torch.zeros_like(x)
    for e in range(config.experts):
        mine = (ids == e) & kept
        factor = (factors * mine).sum(1, keepdim=True)
        one = {n.removeprefix("experts."): w[e] for n, w in weights.items() if n.startswith("experts.")}
        made = _ffn(config, one, x * factor) if config.weight_on_input else _ffn(config, one, x) * factor
        y = y + torch.where(mine.any(1, keepdim=True), made, torch.zeros_like(made))
    if config.shared_intermediate:
        made = _ffn(config, {n.removeprefix("shared."): w for n, w in weights.items() if n.startswith("shared.")}, x)
        y = y + (made * torch.sigmoid(x @ weights["shared_gate.weight"].T) if config.shared_gate else made)
    return y


def _ffn(config, weights, x):
    up = functional.linear(x, weights["up.weight"], weights.get("up.bias"))
    gate = functional.linear(x, weights["gate.weight"], weights.get("gate.bias")) if config.gated else None
    return functional.linear(_activation(config, gate, up), weights["down.weight"], weights.get("down.bias"))


def _activation(config, gate, up):
    kind = config.activation
    if kind == "swiglu_clamped":
        g, u = gate.clamp(max=config.swiglu_limit), up.clamp(-config.swiglu_limit, config.swiglu_limit)
        return g * torch.sigmoid(config.swiglu_alpha * g) * (u + 1)
    acted = up if gate is None else gate
    made = {
        "swiglu": functional.silu,
        "silu": functional.silu,
        "reglu": functional.relu,
        "relu": functional.relu,
        "relu2": lambda t: functional.relu(t) ** 2,
        "geglu": functional.gelu,
        "gelu": functional.gelu,
        "geglu_tanh": lambda t: functional.gelu(t, approximate="tanh"),
        "gelu_tanh": lambda t: functional.gelu(t, approximate="tanh"),
    }[kind](acted)
    return made if gate is None else made * up
