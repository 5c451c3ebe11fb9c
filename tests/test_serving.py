"""`transformers serve` with a model's experts on moegen, asked by OpenAI's own client over loopback."""

from __future__ import annotations

import os
import pathlib
import re
import socket
import subprocess
import sys
import time

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
openai = pytest.importorskip("openai")
pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")

import models  # noqa: E402
from helpers import ROOT  # noqa: E402

from moegen.serve_bench import Load, LoadRequest, ServerTarget, serve_bench  # noqa: E402
from moegen.transformers import serve  # noqa: E402

TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant:"
MESSAGES = [{"role": "user", "content": "how many experts?"}]
NEW_TOKENS = 12


def tokenizer():
    """Printable characters and nothing else, made here."""
    from tokenizers import Tokenizer, decoders
    from tokenizers.models import BPE

    special = ["<pad>", "<s>", "</s>"]
    made = Tokenizer(BPE(vocab={token: i for i, token in enumerate([*special, "\n", *map(chr, range(32, 127))])}, merges=[]))
    made.decoder = decoders.Fuse()
    made.add_special_tokens(special)
    tokens = {"pad_token": special[0], "bos_token": special[1], "eos_token": special[2]}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, chat_template=TEMPLATE, **tokens)


@pytest.fixture(scope="module")
def folder(store, tmp_path_factory):
    """A folder with a tiny model and its tokenizer, beside a store with its artifact."""
    folder = tmp_path_factory.mktemp("serving")
    models.build_artifacts(store, folder / "store", [{}])
    text = tokenizer()
    text.save_pretrained(folder / "model")
    models.make_model("olmoe", vocab_size=len(text)).save_pretrained(folder / "model")
    return folder


def start(folder: pathlib.Path, *arguments: str) -> subprocess.Popen[bytes]:
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "MOEGEN_STORE": str(folder / "store"),
        "OMP_NUM_THREADS": "2",
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(folder / "hub"),
    }
    command = [sys.executable, "-m", "moegen.transformers.serve", *arguments, "--host", "127.0.0.1", "--device", "cpu"]
    with (folder / "log.txt").open("wb") as log:
        return subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log)


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


@pytest.fixture(scope="module")
def client(folder):
    port = free_port()
    process = start(folder, str(folder / "model"), "--port", str(port))
    try:
        wait_for(port, process, folder)
        yield openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, timeout=120)
    finally:
        process.kill()
        process.wait()


def wait_for(port: int, process: subprocess.Popen[bytes], folder: pathlib.Path) -> None:
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and process.poll() is None:
        with socket.socket() as one:
            if one.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.1)
    pytest.fail(f"the server did not start: {(folder / 'log.txt').read_text()}")


@pytest.fixture(scope="module")
def expected(folder):
    """What the model answers when the library runs all of it."""
    text = transformers.AutoTokenizer.from_pretrained(folder / "model")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "model", experts_implementation="eager")
    ids = text.apply_chat_template(MESSAGES, add_generation_prompt=True, return_tensors="pt", return_dict=True)["input_ids"]
    out = model.generate(ids, max_new_tokens=NEW_TOKENS, do_sample=False)
    return text.decode(out[0, ids.shape[1] :], skip_special_tokens=True)


@pytest.mark.slow
def test_chat_completion_streamed(folder, client, expected):
    stream = client.chat.completions.create(
        model=str(folder / "model"), messages=MESSAGES, stream=True, max_tokens=NEW_TOKENS, temperature=0
    )
    parts = [chunk.choices[0].delta.content for chunk in stream if chunk.choices and chunk.choices[0].delta.content]
    assert len(parts) > 2, "it came in one piece"
    assert "".join(parts) == expected
    whole = client.chat.completions.create(model=str(folder / "model"), messages=MESSAGES, max_tokens=NEW_TOKENS, temperature=0)
    assert whole.choices[0].message.content == expected
    assert whole.usage.completion_tokens == NEW_TOKENS
    said = (folder / "log.txt").read_text()
    assert re.search(rf"moegen: packed [\d.]+ kB of experts of {folder / 'model'}", said), said


@pytest.mark.slow
def test_a_load(folder, client):
    """By the load generator: every request is answered, with as many tokens as were asked for."""
    pytest.importorskip("aiohttp")
    target = ServerTarget(str(client.base_url), str(folder / "model"), extra_body={"temperature": 0})
    load = Load(concurrency=2, requests=6, prompt="3-9", output="4")
    (entry,) = serve_bench(target, LoadRequest(load, warmup=1))["contenders"]
    assert entry["summary"]["succeeded"] == 6, entry["summary"]["failures"]
    assert entry["summary"]["output_tokens"] == 6 * 4
    assert entry["summary"]["latency"]["ttft"]["max"] < entry["summary"]["latency"]["e2e"]["max"]


def test_what_cannot_be_served_says_so(folder, tmp_path, monkeypatch):
    model = models.make_model("mixtral", hidden_act="quick_gelu", vocab_size=len(tokenizer()))
    model.save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    manager = serve.ExpertsManager(device="cpu")
    monkeypatch.setenv("MOEGEN_STORE", str(folder / "store"))
    with pytest.raises(serve.ConfigError, match="quick_gelu"):
        manager.load_model_and_processor(manager.process_model_name(str(tmp_path)))
    manager.shutdown()
