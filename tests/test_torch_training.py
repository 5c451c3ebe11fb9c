"""`TrainableMoELayer`: its backward against autograd of plain torch and finite differences, and weights that are never stale."""

from __future__ import annotations

import copy
import dataclasses
import io

import numpy as np
import pytest

import moegen
from moegen import reference
from moegen.config import ACTIVATIONS, weight_shapes
from moegen.errors import InputError, WeightsError

torch = pytest.importorskip("torch")

from torch_layers import CONFIGS, build_apart, dense  # noqa: E402

from moegen.torch import MoELayer, TrainableMoELayer, gradients  # noqa: E402

H = 16
BOUND = {"float32": 2e-6, "bfloat16": 4e-3}  # relative to float64; bfloat16 gradients are rounded to that


@pytest.fixture(scope="module")
def paths(store):
    return build_apart(store.parent / "torch")


@pytest.fixture(scope="module")
def modules(paths):
    return {name: moegen.load(path, threads=1) for name, path in paths.items()}


@pytest.fixture(autouse=True)
def fresh_dynamo():
    yield
    torch._dynamo.reset()


def given_weights(config, rng):
    return reference.random_weights(config, rng)


def wide(weights):
    """float64 leaves of autograd."""
    return {n: torch.tensor(w, dtype=torch.float64, requires_grad="correction" not in n) for n, w in weights.items()}


def trainable(weights):
    return [name for name in weights if "correction" not in name]


# ---------------------------------------------------------------- the formulas, in float64


def gradcheck(config, rng, tokens=9, jitter=False):
    """The formulas against finite differences of the layer in plain torch, for choices that the reference makes."""
    weights = given_weights(config, rng)
    names = trainable(weights)
    x = rng.standard_normal((tokens, H))
    routing = reference.route(config, weights, x)
    ids, kept = torch.tensor(routing.ids).long(), torch.tensor(routing.kept)
    seen = torch.tensor(x * rng.uniform(0.9, 1.1, x.shape), requires_grad=True) if jitter else None

    class Layer(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, seen, *values):
            ctx.save_for_backward(x, seen, *values)
            return dense(config, dict(zip(names, values, strict=True)), x, ids, kept, seen)

        @staticmethod
        def backward(ctx, grad):
            x, seen, *values = ctx.saved_tensors
            given = dict(zip(names, values, strict=True))
            of_x, of_seen, found = gradients.layer_gradients(config, given, x, ids, grad, None, seen, frozenset(names))
            return of_x, of_seen, *[found[name] for name in names]

    leaves = wide(weights)
    inputs = (torch.tensor(x, requires_grad=True), seen, *(leaves[name] for name in names))
    assert torch.autograd.gradcheck(Layer.apply, inputs, fast_mode=True)


@pytest.mark.parametrize("name", CONFIGS)
def test_gradcheck_of_layers(rng, name):
    gradcheck(CONFIGS[name], rng)
    gradcheck(CONFIGS[name], rng, jitter=True)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("on_input", [False, True])
def test_gradcheck_of_activations(rng, activation, on_input):
    gradcheck(
        moegen.MoEConfig(
            experts=4, top_k=2, hidden=H, intermediate=12, activation=activation, expert_bias=True, weight_on_input=on_input
        ),
        rng,
    )


@pytest.mark.parametrize("gating", ["softmax", "topk_softmax", "sigmoid"])
@pytest.mark.parametrize("renormalize", [False, True])
def test_gradcheck_of_gatings(rng, gating, renormalize):
    gradcheck(
        moegen.MoEConfig(
            experts=5,
            top_k=3,
            hidden=H,
            intermediate=12,
            gating=gating,
            renormalize=renormalize,
            routed_scaling=1.7,
            router_bias=True,
        ),
        rng,
    )


def test_losses_are_those_of_the_reference(rng):
    for gating in ("softmax", "sigmoid"):
        config = moegen.MoEConfig(experts=5, top_k=2, hidden=H, gating=gating)
        weights = given_weights(config, rng)
        x = rng.standard_normal((12, H))
        wanted = reference.route(config, weights, x)
        leaf = torch.tensor(x, requires_grad=True)
        z = gradients.logits(wide(weights), leaf)
        found = gradients.losses(config, z, torch.tensor(wanted.load))
        for loss, exact in zip(found, (wanted.load_balancing_loss, wanted.adaptive_loss, wanted.z_loss), strict=True):
            assert float(loss.detach()) == pytest.approx(exact, rel=1e-12)
            assert torch.autograd.grad(loss, leaf, retain_graph=True)[0].abs().sum() > 0
        assert [float(v) for v in gradients.losses(config, z[:0].detach(), torch.zeros(5))] == [0.0, 0.0, 0.0]


def test_kept_is_that_of_the_reference(rng):
    for factor in (None, 0.5, 1.0, 1.3):
        config = moegen.MoEConfig(experts=4, top_k=2, hidden=H, capacity_factor=factor)
        ids = np.argsort(rng.random((13, 4)), axis=1)[:, :2]
        assert gradients.kept(config, torch.from_numpy(ids)).tolist() == reference.capacity_mask(config, ids).tolist()


# ---------------------------------------------------------------- the layer


def settled(config, weights, rng, tokens=11, margin=1e-4):
    """[tokens, H] in the layer's dtype, without near ties."""
    for _ in range(100):
        x = reference.round_to_dtype(rng.standard_normal((tokens, H)), config.dtype)
        if reference.margins(config, weights, x).min() > margin:
            return x
    raise AssertionError("nothing but near ties")


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("dtype", [None, torch.float64])
def test_gradients_are_those_of_plain_torch(modules, rng, name, dtype):
    config = CONFIGS[name]
    weights = given_weights(config, rng)
    x = settled(config, weights, rng)
    routing = reference.route(config, weights, x)
    layer = TrainableMoELayer(modules[name], weights, dtype=dtype)
    leaf = torch.from_numpy(x).to(layer.trained.dtype).requires_grad_()
    y, decided = layer(leaf, return_routing=True)
    assert torch.equal(y.detach(), MoELayer(modules[name], weights)(leaf.detach()))
    assert int(decided.dropped) == int((~routing.kept).sum())

    exact, x64 = wide(weights), torch.tensor(x, dtype=torch.float64, requires_grad=True)
    wanted = dense(config, exact, x64, torch.tensor(routing.ids).long(), torch.tensor(routing.kept))
    grad = torch.from_numpy(reference.round_to_dtype(rng.standard_normal(x.shape), config.dtype))
    z = gradients.logits(exact, x64)
    balance, _, z_loss = gradients.losses(config, z, torch.tensor(routing.load))
    (wanted * grad).sum().add(0.3 * balance + 0.1 * z_loss).backward()
    ((y.float() * grad).sum() + 0.3 * decided.load_balancing_loss + 0.1 * decided.z_loss).backward()
    parameters = dict(layer.named_parameters())
    assert set(parameters) == set(trainable(weights))
    for name_of, found, true in [("x", leaf, x64), *((n, p, exact[n]) for n, p in parameters.items())]:
        assert found.grad.dtype == found.dtype
        assert found.grad.shape == found.shape
        error = (found.grad.double() - true.grad).norm() / true.grad.norm()
        ways = 3 if name_of.startswith("router") else 1  # by the output and two losses, with a rounding on each
        assert error <= ways * BOUND[config.dtype], (name_of, error)


def test_finite_differences_of_the_compiled_forward(modules, rng):
    """In float32, along random directions, where neither a choice nor a capacity changes."""
    config = CONFIGS["shared"]
    weights = given_weights(config, rng)
    x = torch.from_numpy(settled(config, weights, rng, margin=2e-2))
    layer = TrainableMoELayer(modules["shared"], weights)
    leaf = x.clone().requires_grad_()
    mix = torch.randn(x.shape)
    (layer(leaf) * mix).sum().backward()
    step = 2e-3

    def loss(x):
        with torch.no_grad():
            return float((layer(x).double() * mix).sum())

    for tensor in (leaf, *layer.parameters()):
        direction = torch.randn(tensor.shape) / tensor.numel() ** 0.5
        with torch.no_grad():
            start = tensor.clone()
            ends = []
            for sign in (step, -step):
                tensor.copy_(start + sign * direction)
                ends.append(loss(leaf))
            tensor.copy_(start)
        along = float((tensor.grad * direction).sum())
        assert (ends[0] - ends[1]) / (2 * step) == pytest.approx(along, rel=2e-2, abs=2e-3)


def test_gradients_through_jitter_and_routing_weights(modules, rng):
    config = CONFIGS["biased"]
    weights = given_weights(config, rng)
    layer = TrainableMoELayer(modules["biased"], weights)
    x = torch.from_numpy(settled(config, weights, rng)).bfloat16()
    leaf, jitter = x.clone().requires_grad_(), torch.ones(x.shape, requires_grad=True)
    layer(leaf, jitter=jitter).float().sum().backward()
    assert jitter.grad.abs().sum() > 0
    both, apart = leaf.grad.clone(), x.clone().requires_grad_()
    layer(apart).float().sum().backward()  # jitter of ones changes nothing
    torch.testing.assert_close(both, apart.grad, rtol=2e-2, atol=2e-2)
    layer.zero_grad()
    routing = layer(x, return_routing=True)[1]
    (routing.weights * torch.randn(routing.weights.shape)).sum().backward()
    assert layer.router.weight.grad.abs().sum() > 0
    assert not layer.experts.up.weight.grad.any()


def test_training_lowers_the_loss(modules, rng):
    torch.manual_seed(0)
    teacher = MoELayer(modules["shared"], given_weights(CONFIGS["shared"], rng))
    layer = TrainableMoELayer(modules["shared"])
    x = torch.randn(64, H)
    optimizer = torch.optim.Adam(layer.parameters(), lr=1e-2)
    seen = []
    for _ in range(40):
        optimizer.zero_grad()
        loss = (layer(x) - teacher(x)).square().mean()
        loss.backward()
        optimizer.step()
        seen.append(float(loss.detach()))
    assert seen[-1] < 0.5 * seen[0]


# ---------------------------------------------------------------- never stale


def assert_fresh(layer, x):
    assert torch.equal(layer(x).detach(), layer.frozen()(x))


@pytest.mark.parametrize("fused", [False, True])
def test_optimizers_are_noticed(modules, rng, fused):
    layer = TrainableMoELayer(modules["grouped"], given_weights(CONFIGS["grouped"], rng))
    x = torch.randn(7, H)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-2, fused=fused)
    for step in range(3):
        optimizer.zero_grad()
        layer(x).square().sum().backward()
        optimizer.step()
        assert_fresh(layer, x)
        assert layer.trained.packings == step + 2
        layer(x)
        assert layer.trained.packings == step + 2  # packed once for each change


def test_all_kinds_of_changes_are_noticed(modules, rng):
    config = CONFIGS["shared"]
    layer = TrainableMoELayer(modules["shared"], given_weights(config, rng))
    x = torch.randn(64, H)  # of which some visit each expert
    up, router = layer.experts.up.weight, layer.router.weight

    def in_inference_mode():
        with torch.inference_mode():
            up.mul_(1.1)

    def without_grad():
        with torch.no_grad():
            up[3, 4, 5] += 1.0  # one element, which torch counts

    changes = [
        without_grad,
        in_inference_mode,
        lambda: up.data.mul_(1.1),
        lambda: up.data[2].zero_(),
        lambda: setattr(router, "data", router.data * 1.5),
        lambda: router.detach().numpy().__imul__(np.float32(0.9)),
        lambda: layer.load_state_dict({n: torch.from_numpy(w) for n, w in given_weights(config, rng).items()}),
        lambda: layer.load_state_dict({n: torch.from_numpy(w) for n, w in given_weights(config, rng).items()}, assign=True),
        lambda: setattr(layer.shared.down, "weight", torch.nn.Parameter(torch.randn(H, 12))),
        lambda: torch.nn.init.normal_(layer.shared_gate.weight),
        lambda: layer.half(),
    ]
    for change in changes:
        before = layer(x)
        change()
        assert not torch.equal(layer(x), before), change
        assert_fresh(layer, x)
    layer.float()
    layer(x)
    layer.experts.gate.weight.data.view(-1)[1] += 1.0  # behind torch's back, and one element only
    layer.refresh()
    assert_fresh(layer, x)
    other = {n: torch.from_numpy(w) for n, w in given_weights(config, rng).items()}
    wanted = MoELayer(modules["shared"], other)(x)
    assert torch.equal(torch.func.functional_call(layer, other, (x,)), wanted)
    assert_fresh(layer, x)


def test_changing_weights_before_backward_is_an_error(modules, rng):
    layer = TrainableMoELayer(modules["shared"], given_weights(CONFIGS["shared"], rng))
    y = layer(torch.randn(5, H))
    with torch.no_grad():
        layer.router.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_an_error_while_packing_leaves_nothing_stale(modules, rng):
    layer = TrainableMoELayer(modules["shared"], given_weights(CONFIGS["shared"], rng))
    x = torch.randn(5, H)
    layer(x)
    good = layer.experts.up.weight
    layer.router.weight.data.mul_(2)
    layer.experts.up.weight = torch.nn.Parameter(torch.zeros(2, 2))
    with pytest.raises(WeightsError, match=r"experts.up.weight"):
        layer(x)
    layer.experts.up.weight = good
    assert_fresh(layer, x)


# ---------------------------------------------------------------- a module among others


def test_compiled_training_step(modules, rng):
    layer = TrainableMoELayer(modules["shared"], given_weights(CONFIGS["shared"], rng))
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for tokens in (6, 9):
        x = torch.randn(tokens, H)
        found = []
        for call in (layer, compiled):
            layer.zero_grad()
            y, routing = call(x, return_routing=True)
            (y.square().sum() + routing.load_balancing_loss).backward()
            found.append({n: p.grad.clone() for n, p in layer.named_parameters()})
        for name, grad in found[0].items():
            torch.testing.assert_close(found[1][name], grad)
        with torch.no_grad():
            layer.experts.down.weight.mul_(0.9)
        assert torch.equal(compiled(x).detach(), layer.frozen()(x))


def test_opcheck(modules, rng):
    layer = TrainableMoELayer(modules["shared"], given_weights(CONFIGS["shared"], rng))
    state, x = layer.trained, torch.randn(5, H, requires_grad=True)
    weights = [w.detach().requires_grad_() for w in layer.parameters()]
    arguments = (x, weights, state.number, layer.config.experts, layer.config.top_k, None)
    torch.library.opcheck(torch.ops.moegen.trained.default, arguments)


def test_exported_with_its_weights(modules, rng):
    layer = TrainableMoELayer(modules["shared"], given_weights(CONFIGS["shared"], rng))
    program = torch.export.export(layer, (torch.zeros(4, H),))
    x = torch.randn(4, H)
    assert torch.equal(program.module()(x), layer(x))
    assert set(program.state_dict) == set(weight_shapes(layer.config))


def test_copies_and_pickles(modules, rng):
    layer = TrainableMoELayer(modules["grouped"], given_weights(CONFIGS["grouped"], rng))
    x = torch.randn(5, H)
    y = layer(x)
    twin = copy.deepcopy(layer)
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    restored = torch.load(buffer, weights_only=False)
    for other in (twin, restored):
        assert torch.equal(other(x), y)
        with torch.no_grad():
            other.router.weight.mul_(-1)
        assert_fresh(other, x)
    assert torch.equal(layer(x), y)
    assert list(layer.state_dict()) == list(weight_shapes(layer.config))
    assert layer.router.correction_bias.dtype == torch.float32
    assert "router.correction_bias" not in dict(layer.named_parameters())


def test_only_what_requires_a_gradient_gets_one(modules, rng):
    layer = TrainableMoELayer(modules["shared"], given_weights(CONFIGS["shared"], rng))
    for name, parameter in layer.named_parameters():
        parameter.requires_grad_(name.startswith("router"))
    x = torch.randn(5, H)
    layer(x).sum().backward()
    assert [name for name, p in layer.named_parameters() if p.grad is not None] == ["router.weight"]
    empty = torch.zeros(0, H, requires_grad=True)
    layer(empty).sum().backward()
    assert empty.grad.shape == (0, H)
    with torch.inference_mode():
        assert torch.equal(layer(x), layer.frozen()(x))


def test_under_autocast(modules, rng):
    layer = TrainableMoELayer(modules["shared"], given_weights(CONFIGS["shared"], rng))
    x = torch.randn(5, H)
    layer(x).square().sum().backward()
    wanted = layer.router.weight.grad.clone()
    layer.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x.double())
        assert y.dtype == torch.float32
        y.square().sum().backward()
    torch.testing.assert_close(layer.router.weight.grad, wanted)


def test_refusals(modules, rng, paths):
    config = CONFIGS["shared"]
    weights = given_weights(config, rng)
    module = copy.copy(modules["shared"])
    module.config = dataclasses.replace(config, weight_dtype="int8")
    with pytest.raises(InputError, match="weight_dtype='int8' cannot be trained"):
        TrainableMoELayer(module, weights)
    with pytest.raises(InputError, match="must be a float type"):
        TrainableMoELayer(modules["shared"], weights, dtype=torch.int8)
    layer = TrainableMoELayer(modules["shared"], weights)
    frozen = layer.frozen()
    with pytest.raises(InputError, match="cannot be moved to 'meta'"):
        layer.to("meta")
    with pytest.raises(InputError, match="dtype float64"):
        layer(torch.zeros(3, H, dtype=torch.float64))
    x = torch.ones(3, H)
    given = dict(layer.named_parameters())
    for call, value in (
        (layer, x),
        (lambda w: torch.func.functional_call(layer, given | {"router.weight": w}, x), given["router.weight"]),
    ):
        with pytest.raises(InputError, match="no forward-mode derivative"):
            torch.func.jvp(call, (value,), (torch.ones_like(value),))
    with pytest.raises(InputError, match="number is that of a TrainableMoELayer"):
        torch.ops.moegen.forward(torch.zeros(3, H), layer.trained.number)
    with pytest.raises(InputError, match="weights are constants"):
        torch.ops.moegen.trained(torch.zeros(3, H), [], frozen.bound.number, 6, 3, None)
    x = torch.randn(3, H, requires_grad=True)
    (grad,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    with pytest.raises(InputError, match="no second derivatives"):
        grad.sum().backward()
