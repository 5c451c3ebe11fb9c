"""Models of transformers with their experts on moegen: the same logits, tokens and gradients; changes, copies, errors."""

from __future__ import annotations

import copy
import json
import logging
import multiprocessing
import os
import pickle
import threading

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

import models  # noqa: E402
import transformers  # noqa: E402
from models import HIDDEN, INTERMEDIATE, MODELS, TOP_K, logits, make_model, prompt  # noqa: E402

import moegen  # noqa: E402
from moegen.config import MoEConfig  # noqa: E402
from moegen.errors import ArtifactError, BuildError, ConfigError, InputError, WeightsError  # noqa: E402
from moegen.transformers import building, pack, release, speed  # noqa: E402
from moegen.transformers.experts import understand  # noqa: E402
from moegen.transformers.implementation import experts_of  # noqa: E402
from moegen.transformers.packed import packed_of  # noqa: E402

CLAMPED = {"activation": "swiglu_clamped", "swiglu_limit": 1.5, "expert_bias": True}
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


@pytest.fixture(scope="module", autouse=True)
def artifacts(store, tmp_path_factory):
    """A store of the user's that has the artifacts of all models in this file."""
    own = tmp_path_factory.mktemp("transformers") / "store"
    models.build_artifacts(store, own, [{}, CLAMPED, {"dtype": "bfloat16"}, {"dtype": "float16"}])
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOEGEN_STORE", str(own))
        yield
    torch.set_num_threads(threads)


def on_moegen(model):
    model.set_experts_implementation("moegen")
    return model


@pytest.fixture
def calls(monkeypatch):
    """Names of the modules whose experts moegen ran."""
    seen, original = [], moegen.Layer.experts

    def spy(layer, x, ids, weights):
        seen.append(len(x))
        return original(layer, x, ids, weights)

    monkeypatch.setattr(moegen.Layer, "experts", spy)
    return seen


# ---------------------------------------------------------------- the same results


@pytest.mark.parametrize("model_type", MODELS)
def test_logits_and_greedy_tokens(model_type, calls):
    model, ids = make_model(model_type), prompt()
    want, tokens = logits(model, ids), model.generate(ids, max_new_tokens=8, do_sample=False)
    assert not calls
    on_moegen(model)
    got = logits(model, ids)
    assert calls == [ids.numel()] * len(list(experts_of(model)))
    torch.testing.assert_close(got, want, **CLOSE)
    assert torch.equal(model.generate(ids, max_new_tokens=8, do_sample=False), tokens)
    assert len(calls) > 8
    model.set_experts_implementation("eager")
    calls.clear()
    assert torch.equal(logits(model, ids), want)
    assert not calls


def relative_error(got, want):
    """Of the tokens' logits, the median: rounding sends a token here and there to another expert."""
    return ((got.float() - want).norm(dim=-1) / want.norm(dim=-1)).median().item()


@pytest.mark.parametrize(("model_type", "dtype", "bound"), [("mixtral", "bfloat16", 3e-2), ("olmoe", "float16", 4e-3)])
def test_half_precision(model_type, dtype, bound):
    model, ids = make_model(model_type, dtype=getattr(torch, dtype)), prompt(rows=4)
    exact = logits(copy.deepcopy(model).float(), ids)
    got = logits(on_moegen(model), ids)
    assert got.dtype == getattr(torch, dtype)
    assert relative_error(got, exact) < bound
    experts, x = next(experts_of(model)), torch.randn(9, HIDDEN, dtype=got.dtype)
    weights, chosen = torch.rand(9, models.EXPERTS).topk(TOP_K)
    with torch.inference_mode():
        got = experts(x, chosen, weights)
        model.set_experts_implementation("eager")
        want = copy.deepcopy(experts).float()(x.float(), chosen, weights)
    assert got.dtype == x.dtype
    assert (got.float() - want).norm() / want.norm() < bound / 3


def test_from_pretrained(tmp_path, calls):
    model, ids = make_model("qwen3_moe"), prompt()
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation="moegen")
    torch.testing.assert_close(logits(loaded, ids), logits(model, ids), **CLOSE)
    assert calls
    loaded.save_pretrained(tmp_path / "again")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert again.get_experts_implementation()[""] != "moegen"
    torch.testing.assert_close(logits(again, ids), logits(model, ids), **CLOSE)
    made = transformers.AutoModelForCausalLM.from_config(model.config, experts_implementation="moegen")
    assert made.get_experts_implementation()[""] == "moegen"


@pytest.mark.parametrize("model_type", MODELS)
def test_built_from_the_models_config(tmp_path, model_type):
    """What is built at first use is what `moegen build --model config.json` builds, so that either finds the other's."""
    model = make_model(model_type)
    model.save_pretrained(tmp_path)
    config = MoEConfig.from_hf(tmp_path / "config.json")
    assert understand(next(experts_of(model)), TOP_K).config == config


def test_a_type_that_moegen_does_not_know(calls):
    """The experts are asked what they compute, not the model what it is called."""
    config = transformers.AutoConfig.for_model(
        "ernie4_5_moe",
        **models.SIZES,
        intermediate_size=24,
        moe_intermediate_size=INTERMEDIATE,
        moe_num_experts=models.EXPERTS,
        moe_k=TOP_K,
        moe_layer_start_index=0,
        head_dim=8,
    )
    with pytest.raises(ConfigError):
        MoEConfig.from_hf(config.to_dict())
    model = transformers.AutoModelForCausalLM.from_config(config, experts_implementation="eager").eval()
    want = logits(model, prompt())
    torch.testing.assert_close(logits(on_moegen(model), prompt()), want, **CLOSE)
    assert calls


def test_autocast():
    model, ids = make_model("mixtral"), prompt()
    want = logits(model, ids)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = logits(on_moegen(model), ids)
    assert relative_error(got, want) < 3e-2


# ---------------------------------------------------------------- changes and copies


def edits():
    def module(model):
        return next(experts_of(model))

    def replaced(model):
        module(model).down_proj = torch.nn.Parameter(module(model).down_proj.detach() * 1.5)

    def moved(model):
        module(model).gate_up_proj.data = module(model).gate_up_proj.data.clone() * 1.5

    def in_place(model):
        with torch.no_grad():
            module(model).gate_up_proj[1].mul_(1.5)

    def behind_its_back(model):
        module(model).down_proj.data[:].mul_(1.5)

    def one_expert_behind_its_back(model):
        module(model).down_proj.data[2].zero_()

    def state_dict(model):
        model.load_state_dict(make_model("mixtral", seed=5).state_dict())

    return [replaced, moved, in_place, behind_its_back, one_expert_behind_its_back, state_dict]


@pytest.mark.parametrize("edit", edits(), ids=lambda edit: edit.__name__)
def test_changed_weights_are_packed_again(edit):
    model, ids = on_moegen(make_model("mixtral")), prompt(rows=4)
    before = logits(model, ids)
    edit(model)
    got = logits(model, ids)
    model.set_experts_implementation("eager")
    want = logits(model, ids)
    assert not torch.allclose(before, want, **CLOSE)
    torch.testing.assert_close(got, want, **CLOSE)


def test_unchanged_weights_are_packed_once():
    model = on_moegen(make_model("mixtral"))
    logits(model, prompt())
    packed = [packed_of(module).layer(TOP_K).packed for module in experts_of(model)]
    logits(model, prompt(seed=1))
    pack(model)
    assert all(packed_of(m).layer(TOP_K).packed is p for m, p in zip(experts_of(model), packed, strict=True))


def test_copies_have_weights_of_their_own():
    model, ids = on_moegen(make_model("mixtral")), prompt()
    want = logits(model, ids)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with torch.no_grad():
            next(experts_of(other)).down_proj.zero_()
        assert not torch.allclose(logits(other, ids), want, **CLOSE)
        assert torch.equal(logits(model, ids), want)


def test_other_models_go_when_they_are_freed():
    model = on_moegen(make_model("mixtral"))
    pack(model)
    packed = packed_of(next(experts_of(model)))
    del model
    with pytest.raises(InputError, match="freed"):
        packed.layer(TOP_K)


def test_threads_follow_torch():
    model, ids = on_moegen(make_model("mixtral")), prompt()
    want = logits(model, ids)
    try:
        torch.set_num_threads(1)
        assert torch.equal(logits(model, ids), want)
        assert {packed_of(module).layer(TOP_K).threads for module in experts_of(model)} == {1}
    finally:
        torch.set_num_threads(2)


def test_two_threads_at_once():
    model, prompts = on_moegen(make_model("mixtral")), [prompt(seed) for seed in range(2)]
    found = [[], []]

    def work(which):
        found[which] += [logits(model, prompts[which]) for _ in range(8)]

    threads = [threading.Thread(target=work, args=(which,)) for which in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    model.set_experts_implementation("eager")
    for which in range(2):
        want = logits(model, prompts[which])
        assert len(found[which]) == 8
        for got in found[which]:
            torch.testing.assert_close(got, want, **CLOSE)


# ---------------------------------------------------------------- autograd and compilation


@pytest.mark.parametrize("model_type", ["mixtral", "gpt_oss"])
def test_gradients(model_type):
    model, ids = make_model(model_type), prompt()
    found = {}
    for way in ("eager", "moegen"):
        model.set_experts_implementation(way)
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        found[way] = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert found["moegen"].keys() == found["eager"].keys()
    assert any("experts.down_proj" in name for name in found["moegen"])
    assert any("router" in name or "gate.weight" in name for name in found["moegen"])
    for name, want in found["eager"].items():
        torch.testing.assert_close(found["moegen"][name], want, rtol=1e-3, atol=1e-4 * want.abs().max().item() + 1e-7)


def test_training_steps_repack():
    model, ids = make_model("mixtral").train(), prompt()
    other = copy.deepcopy(model)
    losses = {}
    for way, one in (("eager", model), ("moegen", other)):
        one.set_experts_implementation(way)
        optimizer = torch.optim.SGD(one.parameters(), lr=0.05)
        losses[way] = []
        for _ in range(3):
            optimizer.zero_grad()
            loss = one(ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            losses[way].append(loss.item())
    assert losses["eager"][0] > losses["eager"][-1]
    assert losses["moegen"] == pytest.approx(losses["eager"], rel=1e-3)


def test_compiled_models():
    """One graph, which each of two models runs with its own weights, changed ones too."""
    ids = prompt()
    torch._dynamo.reset()
    for seed in range(2):
        model = on_moegen(make_model("mixtral", seed=seed, num_hidden_layers=1))
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(logits(compiled, ids), logits(model, ids), **CLOSE)
        with torch.no_grad():
            next(experts_of(model)).down_proj.mul_(2)
        torch.testing.assert_close(logits(compiled, ids), logits(model, ids), **CLOSE)
    model.train()
    with torch.enable_grad():
        loss = torch.compile(model, backend="aot_eager")(ids, labels=ids).loss
        loss.backward()
    assert next(experts_of(model)).down_proj.grad.abs().max() > 0


def test_operator_is_a_good_one():
    model = on_moegen(make_model("mixtral"))
    pack(model)
    number = packed_of(next(experts_of(model))).number
    x, weights = torch.randn(3, HIDDEN), torch.rand(3, TOP_K)
    ids = torch.tensor([[0, 1], [2, 3], [3, 0]])
    torch.library.opcheck(torch.ops.moegen.model_experts, (x, ids, weights, number), test_utils=("test_schema", "test_faketensor"))


# ---------------------------------------------------------------- memory


def test_release(tmp_path):
    model, ids = on_moegen(make_model("gpt_oss")), prompt()
    want = logits(model, ids)
    parameters = sum(p.nbytes for m in experts_of(model) for p in m.parameters(recurse=False))
    assert release(model) == parameters
    assert release(model) == 0
    assert torch.equal(logits(model, ids), want)
    assert torch.equal(logits(torch.compile(model, backend="aot_eager"), ids), want)
    model.generate(ids, max_new_tokens=3, do_sample=False)
    assert sum(p.numel() for p in model.parameters()) > parameters / 4
    assert "Released" in repr(next(experts_of(model)).down_proj)
    for use in (
        lambda: model.save_pretrained(tmp_path),
        lambda: model.to(torch.bfloat16),
        lambda: torch.save(model.state_dict(), os.devnull),
        lambda: copy.deepcopy(model),
        lambda: next(experts_of(model)).down_proj + 1,
        lambda: logits(model.set_experts_implementation("eager") or model, ids),
    ):
        with pytest.raises(WeightsError, match="released after packing"):
            use()
    assert not list(tmp_path.glob("*.safetensors"))


def test_new_parameters_after_release():
    model, other, ids = on_moegen(make_model("mixtral")), make_model("mixtral", seed=3), prompt()
    release(model)
    next(experts_of(model)).down_proj = next(experts_of(other)).down_proj
    with pytest.raises(WeightsError, match=r"some .* were released"):
        logits(model, ids)
    model.load_state_dict(other.state_dict(), assign=True)
    torch.testing.assert_close(logits(model, ids), logits(other, ids), **CLOSE)


def test_release_wants_the_implementation():
    with pytest.raises(InputError, match="set_experts_implementation"):
        release(make_model("mixtral"))
    with pytest.raises(InputError, match="no experts"):
        release(torch.nn.Linear(2, 2))


# ---------------------------------------------------------------- what cannot be run


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"hidden_act": "quick_gelu"}, "activation.*quick_gelu"),
        ({"hidden_act": "tanh"}, "activation.*tanh"),
        ({"dtype": torch.float64}, "float64"),
    ],
)
def test_refused_models(change, word):
    model = make_model("mixtral", **change)
    with pytest.raises((ConfigError, WeightsError), match=word):
        logits(on_moegen(model), prompt())
    model.set_experts_implementation("eager")
    assert logits(model, prompt()).isfinite().all()


def test_refused_modules():
    module = next(experts_of(make_model("mixtral")))
    module._is_expert_parallel = True
    with pytest.raises(ConfigError, match="expert parallel"):
        understand(module, TOP_K)
    module._is_expert_parallel, module.has_post_expert_norm = False, True
    with pytest.raises(ConfigError, match="has_post_expert_norm"):
        understand(module, TOP_K)
    module.has_post_expert_norm = False
    module.down_proj.data = module.down_proj.data.half()
    with pytest.raises(WeightsError, match=r"down_proj .*float16.*float32"):
        understand(module, TOP_K)
    with pytest.raises(WeightsError, match="meta"):
        understand(module.to("meta"), TOP_K)


def test_sharded_and_quantized_weights_are_refused():
    from torch.distributed.tensor import DTensor, Replicate, init_device_mesh
    from transformers.integrations.finegrained_fp8 import ALL_FP8_EXPERTS_FUNCTIONS

    module = next(experts_of(make_model("mixtral")))
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        module.down_proj = torch.nn.Parameter(DTensor.from_local(module.down_proj.detach(), mesh, [Replicate()]))
        with pytest.raises(WeightsError, match="down_proj is a DTensor"):
            understand(module, TOP_K)
    finally:
        torch.distributed.destroy_process_group()
    with pytest.raises(ConfigError, match="fp8"):
        ALL_FP8_EXPERTS_FUNCTIONS.get_interface("moegen", None)(module)


def test_bad_calls():
    experts = next(experts_of(on_moegen(make_model("mixtral"))))
    x = torch.randn(3, HIDDEN)
    with torch.inference_mode():
        assert experts(x[:0], torch.zeros(0, TOP_K, dtype=torch.long), torch.zeros(0, TOP_K)).shape == (0, HIDDEN)
        with pytest.raises(InputError, match=r"ids\[0, 0\]=4"):
            experts(x, torch.full((3, TOP_K), 4), torch.ones(3, TOP_K))
        with pytest.raises(InputError, match="expected"):
            experts(x, torch.zeros(3, TOP_K, dtype=torch.long), torch.ones(3, 1))


def test_a_cuda_device_needs_an_artifact_for_it():
    config = MoEConfig(experts=4, top_k=2, hidden=HIDDEN, intermediate=INTERMEDIATE, dtype="bfloat16")
    with pytest.raises(ArtifactError, match=r"moegen build --model config.json --target cuda.*--dtype bfloat16 --target cuda"):
        building.module_for(config, "cuda:0")


# ---------------------------------------------------------------- building at first use

FIRST = MoEConfig(experts=2, top_k=1, hidden=16, intermediate=16, activation="reglu")


def _find_or_build(config, folder, name):
    logging.getLogger("moegen.transformers").addHandler(logging.FileHandler(folder / f"{name}.said"))
    (folder / f"{name}.path").write_text(str(building._built(config).path))


@pytest.mark.slow
def test_built_once_at_first_use(tmp_path, monkeypatch):
    """By one of two processes that want it at once, with a message; then found."""
    monkeypatch.setenv("MOEGEN_STORE", str(tmp_path / "store"))
    context = multiprocessing.get_context("fork")  # importing torch twice more would take longer than building
    processes = [context.Process(target=_find_or_build, args=(FIRST, tmp_path, i)) for i in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(300)
    assert [process.exitcode for process in processes] == [0, 0]
    said = sorted((tmp_path / f"{i}.said").read_text() for i in range(2))
    assert said[0] == ""
    assert said[1].startswith(f"moegen: building {FIRST} into {tmp_path / 'store'}")
    assert len({(tmp_path / f"{i}.path").read_text() for i in range(2)}) == 1
    artifact = building.find(FIRST, "llvm")
    assert artifact.verification()["status"] == "passed"
    model = make_model(
        "mixtral", num_local_experts=2, num_experts_per_tok=1, hidden_size=16, intermediate_size=16, hidden_act="relu"
    )
    want = logits(model, prompt())
    torch.testing.assert_close(logits(on_moegen(model), prompt()), want, **CLOSE)
    assert {packed_of(m).layer(1).module.artifact.path for m in experts_of(model)} == {artifact.path.resolve()}
    (artifact.path / "moe.so").write_bytes(b"")
    assert building.find(FIRST, "llvm") is None, "a damaged artifact is no artifact"


@pytest.mark.parametrize(
    ("jinja2", "words"),
    [
        ("raise ModuleNotFoundError('none', name='jinja2')", r"pip install 'moegen\[build\]'"),
        ("import os; os.kill(os.getpid(), 9)", "SIGKILL"),
        ("raise SystemExit('out of luck')", "out of luck"),
    ],
)
def test_a_failed_build_says_why(tmp_path, monkeypatch, jinja2, words):
    (tmp_path / "jinja2.py").write_text(jinja2)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("MOEGEN_STORE", str(tmp_path / "store"))
    model = on_moegen(make_model("mixtral"))
    with pytest.raises(BuildError, match=words):
        logits(model, prompt())
    monkeypatch.setenv("MOEGEN_STORE", os.devnull)
    with pytest.raises(ArtifactError, match="cannot write"):
        logits(model, prompt())


# ---------------------------------------------------------------- speed


def test_speed(tmp_path, capsys):
    make_model("mixtral").save_pretrained(tmp_path)
    out = tmp_path / "speed.json"
    options = [
        "--model",
        str(tmp_path),
        "--layers",
        "1",
        "--dtype",
        "float32",
        "--prompts",
        "3",
        "--new-tokens",
        "2",
        "--rounds",
        "2",
    ]
    assert speed.main([*options, "--json", str(out)]) == 0
    document = json.loads(out.read_text())
    assert [(cell["phase"], cell["tokens"]) for cell in document["cells"]] == [("prefill", 3), ("decode", 1)]
    for cell in document["cells"]:
        ways = cell["implementations"]
        assert list(ways) == ["moegen", "eager", "grouped_mm"]
        assert all(len(way["rounds"]) == 2 and way["seconds"] > 0 and way["relative_l2"] < 1e-4 for way in ways.values())
        assert ways["moegen"]["ratio_least"] == ways["moegen"]["ratio_most"] == 1
    assert "grouped_mm" in capsys.readouterr().out
    assert speed.main(["--model", str(tmp_path / "nowhere")]) == 1
    assert "nowhere" in capsys.readouterr().err
