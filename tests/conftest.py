"""Fixtures that several test files share: a store for the session and modules built into it, once per configuration."""

from __future__ import annotations

import fcntl
import hashlib
import os
import pathlib
import signal
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import moegen


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="rewrite the golden files of the emission tests")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest tests first: no process of pytest-xdist ends up with one of them when the others are done."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """One store for the session, shared by the processes of pytest-xdist (building twice at once is safe)."""
    base = tmp_path_factory.getbasetemp()
    return (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "store"


@pytest.fixture(scope="session")
def built(store: pathlib.Path) -> Callable[..., moegen.Artifact]:
    """Builds a layer into the session's store, or finds it there: built(experts=4, top_k=2, hidden=64, ...)."""

    def build(mcpu: str | None = None, verify: bool = True, **fields: Any) -> moegen.Artifact:
        config = moegen.MoEConfig(**fields)
        store.mkdir(parents=True, exist_ok=True)
        name = hashlib.sha256(f"{config.to_dict()} {mcpu}".encode()).hexdigest()[:16]
        with open(store / f".lock-{name}", "w") as lock:  # the other processes wait for the one that builds it
            fcntl.flock(lock, fcntl.LOCK_EX)
            return moegen.build(config, out=store, mcpu=mcpu, verify=verify)

    return build


@pytest.fixture
def rng() -> np.random.Generator:
    """Fresh random numbers; the seed is printed when a test fails."""
    seed = int(np.random.default_rng().integers(2**31))
    print(f"rng seed {seed}")
    return np.random.default_rng(seed)


@pytest.fixture(scope="session", autouse=True)
def interrupts_arrive() -> None:
    """Here and in the processes that tests start: a shell makes what it runs in the background, and so a suite, deaf to them."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:  # nohup: this process goes on, but notices
        signal.signal(signal.SIGHUP, lambda number, frame: None)


@pytest.fixture(scope="session", autouse=True)
def no_records(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Builds do not use what the user of this machine has tuned; processes that tests start see this, too."""
    os.environ["MOEGEN_LOGS"] = str(tmp_path_factory.mktemp("no-records"))
