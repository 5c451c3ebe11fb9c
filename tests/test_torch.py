"""Layers as operators and modules of torch: the bits of the layer alone, compile and export, and errors that say what to do."""

from __future__ import annotations

import copy
import gc
import io
import os
import pickle
import subprocess
import sys
import threading

import numpy as np
import pytest
from helpers import ROOT, run_python

import moegen
from moegen.errors import ArtifactError, InputError, WeightsError
from moegen.reference import moe, random_weights

torch = pytest.importorskip("torch")

from torch_layers import CONFIGS, build_apart  # noqa: E402

from moegen.torch import BoundLayer, MoELayer, experts, forward, handles, route  # noqa: E402

H, E, K = 16, 6, 3  # of the layer that most tests take


@pytest.fixture(scope="module")
def paths(store):
    return build_apart(store.parent / "torch")


@pytest.fixture(scope="module")
def weights():
    return {name: random_weights(config, np.random.default_rng(3)) for name, config in CONFIGS.items()}


@pytest.fixture
def layer(paths, weights):
    """A `MoELayer` of its own for each test."""
    return MoELayer(paths["shared"], weights["shared"], threads=1)


@pytest.fixture
def x(rng):
    return torch.from_numpy(rng.standard_normal((2, 5, H), dtype=np.float32))


@pytest.fixture(autouse=True)
def fresh_dynamo():
    yield
    torch._dynamo.reset()


class Counting:
    """A backend of torch.compile that counts the graphs it is given."""

    def __init__(self):
        self.graphs = 0

    def __call__(self, graph, _):
        self.graphs += 1
        return graph


class Model(torch.nn.Module):
    """A layer between others."""

    def __init__(self, layer):
        super().__init__()
        self.first, self.moe = torch.nn.Linear(H, H), layer

    def forward(self, x):
        y, routing = self.moe(self.first(x), return_routing=True)
        return y + x, routing.load, routing.z_loss


# ---------------------------------------------------------------- the same as without torch


@pytest.mark.parametrize("name", CONFIGS)
def test_bits_are_those_of_the_layer(paths, weights, rng, name):
    module = MoELayer(paths[name], weights[name])
    for shape in ((7, H), (2, 3, H), (1, H), (0, H), (2, 0, H)):
        x = torch.from_numpy(rng.standard_normal(shape, dtype=np.float32)).to(module.bound.dtype)
        y, routing = module(x, return_routing=True)
        wanted, decided = module.layer(x, return_routing=True)
        assert y.shape == x.shape
        assert y.dtype == x.dtype
        assert torch.equal(y, wanted)
        assert torch.equal(module(x), wanted)
        for got in (routing, module.route(x)):
            assert torch.equal(got.ids, decided.ids)
            assert torch.equal(got.weights, decided.weights)
            assert got.load.tolist() == decided.load.tolist()
            assert int(got.dropped) == decided.dropped
            for loss in ("load_balancing_loss", "adaptive_loss", "z_loss"):
                assert float(getattr(got, loss)) == getattr(decided, loss)
        alone = module.layer.experts(x, decided.ids, decided.weights)
        for ids, factors in ((decided.ids, decided.weights), (decided.ids.long(), decided.weights.double())):
            assert torch.equal(module.experts(x, ids, factors), alone)
    jitter = torch.rand_like(x.float()) + 0.5
    assert torch.equal(module(x, jitter=jitter), module.layer(x, jitter=jitter))


def test_module_agrees_with_the_reference(layer, weights, x):
    exact, _ = moe(layer.config, weights["shared"], x.reshape(-1, H).numpy())
    np.testing.assert_allclose(layer(x).reshape(-1, H).numpy(), exact, rtol=1e-4, atol=1e-5)


def test_inputs_that_are_laid_out_otherwise(layer, x):
    y = layer(x)
    swapped = x.transpose(0, 1)
    assert torch.equal(layer(swapped), layer(swapped.contiguous()))
    wide = torch.zeros(2, 5, 2 * H)
    wide[..., 1 : H + 1] = x  # neither contiguous nor aligned
    assert torch.equal(layer(wide[..., 1 : H + 1]), y)
    ragged = torch.empty(10 * H + 1)[1:].view(2, 5, H).copy_(x)  # contiguous, not aligned
    assert torch.equal(layer(ragged), y)
    ids, factors = layer.route(x)[:2]
    spread = torch.stack([ids, ids], dim=2)[..., 0]
    assert not spread.is_contiguous()
    assert torch.equal(layer.experts(x, spread, factors), layer.experts(x, ids, factors))


def test_results_are_new_memory(layer, x):
    first = layer(x)
    kept = first.clone()
    layer(-x)
    assert torch.equal(first, kept)


def test_functions_take_layers(layer, x):
    ids, factors, *_ = route(layer.layer, x)
    assert torch.equal(forward(layer.layer, x), layer(x))
    assert torch.equal(experts(layer.layer, x, ids, factors), experts(layer.bound, x, ids, factors))
    assert BoundLayer(layer.layer).number == layer.bound.number
    with pytest.raises(InputError, match=r"Module\.bind"):
        forward("layer", x)


def test_calls_from_several_threads(layer, rng):
    inputs = [torch.from_numpy(rng.standard_normal((t, H), dtype=np.float32)) for t in (1, 3, 17, 40)]
    wanted = [layer.layer(x) for x in inputs]
    wrong = []

    def call(at):
        for _ in range(50):
            if not torch.equal(layer(inputs[at]), wanted[at]):
                wrong.append(at)

    threads = [threading.Thread(target=call, args=(at,)) for at in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


# ---------------------------------------------------------------- compile and export


def test_opcheck(layer, x):
    number = layer.bound.number
    ids, factors, *_ = layer.route(x)
    for operator, arguments in (
        ("forward", (x, number)),
        ("forward", (x, number, 2 * x)),
        ("forward_routed", (x, number, E, K)),
        ("route", (x, number, E, K)),
        ("experts", (x, ids, factors, number)),
    ):
        torch.library.opcheck(getattr(torch.ops.moegen, operator).default, arguments)


def test_compiles_whole_with_any_number_of_tokens(layer, rng):
    model, backend = Model(layer).eval(), Counting()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    with torch.no_grad():
        for tokens in (5, 7, 64, 33):
            x = torch.from_numpy(rng.standard_normal((tokens, H), dtype=np.float32))
            for got, wanted in zip(compiled(x), model(x), strict=True):
                torch.testing.assert_close(got, wanted)
    assert backend.graphs == 2  # one for the first size, one for all others


def test_many_layers_one_by_one(paths, weights, x):
    """More than the cache of torch.compile has places for."""
    module, backend = moegen.load(paths["shared"]), Counting()
    with torch._dynamo.config.patch(allow_unspec_int_on_nn_module=True):
        for _ in range(10):
            layer = MoELayer(module, weights["shared"])
            assert torch.equal(torch.compile(layer, fullgraph=True, backend=backend)(x), layer(x))
    assert backend.graphs == 2


RUN_EXPORTED = """
import sys
import numpy as np, torch
import moegen
from moegen.reference import random_weights
from moegen.torch import MoELayer

program, path = sys.argv[1:]
module = torch.export.load(program).module()
x = torch.arange(48, dtype=torch.float32).reshape(3, 16) / 48
try:
    module(x)
except moegen.InputError as reason:
    assert "MoELayer(..., name=...)" in str(reason), reason
    print("refused")
artifact = moegen.open_artifact(path)
layer = MoELayer(artifact, random_weights(artifact.config, np.random.default_rng(3)), name="model.layers.3.mlp")
assert torch.equal(module(x), layer(x))
print("the same")
"""


def test_exported_program_finds_its_layer_by_name(paths, weights, tmp_path):
    layer = MoELayer(paths["shared"], weights["shared"], name="model.layers.3.mlp")
    dynamic = {"x": {0: torch.export.Dim("tokens", min=1, max=4096)}}
    with torch.no_grad():
        program = torch.export.export(layer, (torch.zeros(4, H),), dynamic_shapes=dynamic)
    x = torch.randn(9, H)
    assert torch.equal(program.module()(x), layer(x))
    torch.export.save(program, tmp_path / "layer.pt2")
    command = [sys.executable, "-c", RUN_EXPORTED, str(tmp_path / "layer.pt2"), paths["shared"]]
    around = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=around, capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout.split("\n")[:2] == ["refused", "the same"], done.stderr


def test_shapes_on_no_device(layer, x):
    assert layer(x.to("meta")).shape == x.shape
    y, routing = layer(x.to("meta"), return_routing=True)
    assert (y.device.type, routing.ids.shape, routing.load.shape) == ("meta", (10, K), (E,))


# ---------------------------------------------------------------- modes of torch


def test_inference_mode_and_autocast(layer, x):
    y = layer(x)
    with torch.inference_mode():
        assert torch.equal(layer(x), y)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(layer(x.double()), y)
        assert torch.equal(layer(x.bfloat16()), layer.layer(x.bfloat16()))
    narrow = layer(x.half())
    assert narrow.dtype == torch.float32  # a float32 layer widens
    assert torch.equal(narrow, layer(x.half().float()))


def test_no_backward(layer, x):
    wants = x.clone().requires_grad_()
    with pytest.raises(InputError, match="TrainableMoELayer"):
        layer(wants)
    with torch.no_grad():
        assert torch.equal(layer(wants), layer(x))
    ids, factors, *_ = layer.route(x)
    for y in (
        torch.ops.moegen.forward(wants, layer.bound.number),
        torch.ops.moegen.experts(x, ids, factors.clone().requires_grad_(), layer.bound.number),
    ):
        with pytest.raises(InputError, match="no backward"):
            y.sum().backward()
    compiled = torch.compile(Model(layer), fullgraph=True, backend="aot_eager")
    with pytest.raises(Exception, match="no backward"):  # torch wraps what happens while it compiles
        compiled(x)


def test_no_forward_mode(layer, x):
    """Torch takes an operator without a derivative for a constant there: tangents would be zeros."""
    routing = layer.route(x)
    for call in (
        layer,
        layer.route,
        lambda v: layer(x, jitter=v),
        lambda v: layer.experts(x, routing.ids, routing.weights * v.reshape(10, -1)[:, :1]),
    ):
        with pytest.raises(InputError, match="no forward-mode derivative"):
            torch.func.jvp(call, (x,), (x,))
    assert torch.equal(torch.func.jvp(lambda v: v * layer(x), (x,), (x,))[1], x * layer(x))


def test_functional_transforms(layer, x):
    assert torch.equal(torch.func.functionalize(layer)(x), layer(x))
    assert torch.equal(torch.vmap(layer)(x), torch.stack([layer(rows) for rows in x]))


# ---------------------------------------------------------------- a module among others


def test_copies_and_pickles(layer, x, paths, weights):
    y = layer(x)
    twin = copy.deepcopy(layer)
    assert twin.layer is layer.layer
    assert torch.equal(twin(x), y)
    buffer = io.BytesIO()
    torch.save(Model(layer), buffer)
    buffer.seek(0)
    restored = torch.load(buffer, weights_only=False).moe
    assert restored.layer is not layer.layer
    assert torch.equal(restored(x), y)

    named = MoELayer(paths["shared"], weights["shared"], name="pickled")
    assert pickle.loads(pickle.dumps(named)).layer is named.layer
    other = {name: 2 * w for name, w in weights["shared"].items()}
    stored = pickle.dumps(named)
    del named
    another = MoELayer(paths["shared"], other, name="pickled")
    with pytest.raises(InputError, match="'pickled' already"):
        pickle.loads(stored)
    del another
    assert torch.equal(pickle.loads(stored)(x), y)


def test_pickle_of_another_build(layer, paths):
    layer.bound.layer.module.artifact.manifest["key"] = "another"  # as if the artifact had been built anew meanwhile
    stored = pickle.dumps(layer)
    with pytest.raises(ArtifactError, match="bind the weights again"):
        pickle.loads(stored)


def test_it_stays_what_and_where_it_is(layer, x):
    model = Model(layer)
    assert not [name for name in model.state_dict() if name.startswith("moe")]
    assert not list(layer.parameters())
    y = layer(x)
    for change in (lambda: model.to("cpu"), model.float, model.eval, model.train, model.requires_grad_, model.share_memory):
        change()
        assert torch.equal(layer(x), y)
    for change, said in (
        (model.half, "compiled for float32 cannot become float16"),
        (lambda: model.to(torch.bfloat16), "cannot become bfloat16"),
        (lambda: model.to("meta"), "compiled for 'cpu' cannot be moved to 'meta'"),
    ):
        with pytest.raises(InputError, match=said):
            change()


def test_names_and_numbers(paths, weights, x):
    first = MoELayer(paths["shared"], weights["shared"], name="a")
    with pytest.raises(InputError, match="named 'a' already"):
        MoELayer(paths["shared"], weights["shared"], name="a")
    with pytest.raises(InputError, match="cannot be named 'b'"):
        MoELayer(first.layer, name="b")
    assert MoELayer(paths["biased"], weights["biased"], name="a").bound.number != first.bound.number  # another layer
    number = first.bound.number
    del first
    gc.collect()
    with pytest.raises(InputError, match=r"\('a'\) was freed"):
        torch.ops.moegen.forward(x, number)
    again = MoELayer(paths["shared"], weights["shared"], name="a")
    assert again.bound.number == number
    assert torch.equal(torch.ops.moegen.forward(x, number), again(x))
    unnamed = [MoELayer(paths["shared"], weights["shared"]).bound.number for _ in range(3)]
    assert len({*unnamed, number}) == 4
    for gone in unnamed:
        with pytest.raises(InputError, match="was freed"):
            handles.layer_of(gone)
    with pytest.raises(InputError, match="no layer with number 5"):
        torch.ops.moegen.forward(x, 5)


def test_what_it_is_made_of(paths, weights, store, x, tmp_path):
    artifact = moegen.open_artifact(paths["shared"])
    y = MoELayer(paths["shared"], weights["shared"])(x)
    block = torch.nn.Module()
    block.state_dict = lambda: {name: torch.from_numpy(w) for name, w in weights["shared"].items()}
    for made in (
        MoELayer(artifact, weights["shared"]),
        MoELayer(moegen.load(paths["shared"]), {f"m.{name}": w for name, w in weights["shared"].items()}, prefix="m."),
        MoELayer(CONFIGS["shared"], weights["shared"], store=store.parent / "torch"),
        MoELayer(moegen.load(paths["shared"]).bind(weights["shared"])),
        MoELayer(artifact, block),
    ):
        assert torch.equal(made(x), y)
    for make, error, said in (
        (lambda: MoELayer(artifact), InputError, "has no weights"),
        (lambda: MoELayer(MoELayer(artifact, weights["shared"]).layer, weights["shared"]), InputError, "has its weights already"),
        (lambda: MoELayer(3, weights["shared"]), InputError, "not of int"),
        (lambda: MoELayer(tmp_path, weights["shared"]), ArtifactError, "no artifact"),
        (lambda: MoELayer(CONFIGS["shared"], weights["shared"], store=tmp_path), ArtifactError, "no artifact"),
        (lambda: MoELayer(artifact, weights["biased"]), WeightsError, "bias"),
        (lambda: MoELayer.from_module(torch.nn.Linear(2, 2)), InputError, "from_module"),
    ):
        with pytest.raises(error, match=said):
            make()


def test_from_a_module_of_transformers(paths, store):
    """The block keeps its model's configuration, the store has a layer for it."""
    pytest.importorskip("transformers")
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssConfig, GptOssMLP

    sizes = {"hidden_size": H, "intermediate_size": 20, "num_local_experts": 4, "num_experts_per_tok": 2, "swiglu_limit": 0.5}
    config = GptOssConfig(**sizes, dtype="bfloat16")
    config._experts_implementation = "eager"
    block = GptOssMLP(config).eval().to(torch.bfloat16)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.normal_(std=0.4)
    made = MoELayer.from_module(block, store=store.parent / "torch")
    assert made.config == CONFIGS["biased"]
    x = torch.randn(1, 9, H).bfloat16()
    with torch.no_grad():
        torch.testing.assert_close(made(x).float(), block(x)[0].float(), rtol=5e-2, atol=5e-2)


def test_wrong_inputs(layer, x):
    number = layer.bound.number
    ids, factors, *_ = layer.route(x)
    for call, said in (
        (lambda: layer(x.double()), "dtype float64, this layer takes float32"),
        (lambda: layer(x.long()), "dtype int64"),
        (lambda: layer(x.numpy()), "x must be a torch tensor, not ndarray"),
        (lambda: layer.experts(None, ids, factors), "not NoneType"),
        (lambda: layer(x[..., :3]), r"shape \[2, 5, 3\]"),
        (lambda: layer(x[0, 0]), r"shape \[16\]"),
        (lambda: layer(x[None]), r"shape \[1, 2, 5, 16\]"),
        (lambda: layer(x, jitter=x[0]), "jitter has shape"),
        (lambda: layer(x, jitter=1.5), "jitter must be a torch tensor of x's shape, not float"),
        (lambda: torch.ops.moegen.forward(x, number, x[0]), "router_x has shape"),
        (lambda: torch.ops.moegen.route(x, number, E, K + 1), "are not those of the layer"),
        (lambda: layer.experts(x, ids[1:], factors), "ids has shape"),
        (lambda: layer.experts(x, ids, factors[:, 1:]), "weights has shape"),
        (lambda: layer.experts(x, ids.float(), factors), "ids must be integers, not float32"),
        (lambda: layer.experts(x, ids.bool(), factors), "ids must be integers, not bool"),
        (lambda: layer.experts(x, ids, factors.int()), "weights must be floating-point"),
        (lambda: layer.experts(x, torch.full_like(ids, E), factors), f"=6 must be between 0 and {E - 1}"),
        (lambda: layer.experts(x, torch.full_like(ids, -1), factors), "=-1 must be between"),
        (lambda: layer.experts(x, torch.full((10, K), 2**32), factors), "must be between"),
        (lambda: layer.experts(x, torch.full((10, K), 2**32 - 1, dtype=torch.uint32), factors), "=2147483647 must be between"),
    ):
        with pytest.raises(InputError, match=said):
            call()
    assert torch.equal(layer(x), layer.layer(x))  # and it goes on
    assert torch.equal(layer.experts(x, ids.to(torch.uint64), factors), layer.experts(x, ids, factors))


def test_placement_is_checked(layer, x):
    """What a tensor of another device gives, with a stand-in for it: there is none here."""
    from moegen.torch import ops

    class Elsewhere:
        is_cpu, device = False, torch.device("cuda", 0)

    with pytest.raises(InputError, match="x is on device 'cuda:0', the layer is on 'cpu': move it with"):
        ops._check_place(layer.layer, Elsewhere(), "x")


def test_importing_moegen_does_not_import_torch():
    done = run_python("import sys, moegen\nassert not any(m.startswith(('torch', 'moegen.torch')) for m in sys.modules)\nprint(1)")
    assert done.returncode == 0, done.stderr
    done = run_python("import moegen.torch")
    assert "moegen.torch needs torch, which is not installed" in done.stderr
