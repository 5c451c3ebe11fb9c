"""Layers as targets: each family of contenders in a process of its own, all with the same weights, tokens and arrivals.

While one plays, the others are stopped. Outputs of some requests are compared with the float64 reference, and with the same rows
in a call of their own: a request's output must not depend on who else was in its batches.
"""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
import signal
from collections.abc import Callable
from typing import Any

import numpy as np

from ..arrays import HostArray, to_float32
from ..bench import workload
from ..bench.contenders.family import Settings
from ..bench.contenders.process import Process, WorkerLost
from ..bench.contenders.roster import FAMILIES, OURS
from .arrivals import Load
from .batching import Limits
from .outcomes import Outcome, Played
from .worker import read_pool

POOL_TOKENS = 1024  # of each of the batches that requests take their tokens from
_KEPT_REQUESTS = 4
_KEPT_AMONG = 32


class Player(Process):
    """A worker process that plays loads."""

    worker = "moegen.serve_bench.worker"

    def play(self, report: Callable[[int], None], **arguments: Any) -> dict[str, Any]:
        """Plays a load; an interrupt ends it early, and the answer says so. A second interrupt ends the process.

        Raises:
            WorkerLost: it crashed, or said nothing for too long.
        """
        interrupted, reply = False, dict[str, Any]()
        with self.awake():
            self.tell("play", **arguments)
            while not reply or "ended" in reply:
                try:
                    reply = self.hear()
                    if "ended" in reply:
                        report(reply["ended"])
                except KeyboardInterrupt:
                    if interrupted:
                        raise
                    interrupted = True
                    self.signal(signal.SIGINT)
        return reply | {"interrupted": True} if interrupted and "error" not in reply else reply


@dataclasses.dataclass
class Checked:
    """How the outputs of a contender's kept requests compare; None for what was not compared.

    Args:
        rows: how many were compared with the reference.
        relative_l2: error relative to the float64 reference.
        same_alone: whether they are bitwise those of the same rows in a call of their own.
        wrong: why the contender is wrong, or nothing.
    """

    rows: int = 0
    relative_l2: float | None = None
    same_alone: bool | None = None
    wrong: str = ""


class Layers:
    """Contenders ready to play, by name; a context manager.

    Args:
        families: family -> contenders, as `chosen_families` gives them.
        settings: what the workers are told; the workload's folder gets the tokens that requests bring.
        seed: of the tokens.
        patience_seconds: how long a worker may say nothing before it counts as hung.

    Attributes:
        names: contenders that can play, ours first.
        absent: the others, each with the reason.
    """

    def __init__(self, families: dict[str, list[str]], settings: Settings, seed: int, patience_seconds: float) -> None:
        self.settings = settings
        self.config = workload.read_layer(settings.folder)
        self.names: list[str] = []
        self.absent: dict[str, str] = {}
        self._patience_seconds = patience_seconds
        self._family_of: dict[str, str] = {}
        self._players: dict[str, Player] = {}
        workload.make_batches(settings.folder, self.config, POOL_TOKENS, seed)
        self._pool = read_pool(settings.folder, POOL_TOKENS)
        try:
            for family, names in families.items():
                self._enlist(family, names)
        except BaseException:
            self.close()
            raise

    def _enlist(self, family: str, names: list[str]) -> None:
        reason = FAMILIES[family].missing()
        try:
            hello = {} if reason else self._player(family).hello
        except WorkerLost as loss:
            reason = str(loss)
        if reason:
            self.absent |= dict.fromkeys(names, reason)
            return
        able = [name for name in names if name in hello["calls"]]
        self._family_of |= dict.fromkeys(able, family)
        self.names += able
        self.absent |= {name: why for name, why in hello["obstacles"].items() if name in names}

    def _player(self, family: str) -> Player:
        """The family's process, a new one where the last was lost.

        Raises:
            WorkerLost: it does not start, or its library refuses the layer.
        """
        if family not in self._players:
            player = Player(family, self.settings, self._patience_seconds)
            if "error" in player.hello:
                player.close()
                raise WorkerLost(player.hello["error"])
            self._players[family] = player
        return self._players[family]

    def play(
        self, name: str, load: Load, warmup: Load | None, limits: Limits, most_seconds: float, report: Callable[[int], None]
    ) -> tuple[Played, dict[str, Any]]:
        """One turn of a contender, and what `check` needs to know of it.

        Raises:
            WorkerLost: it crashed, hung, or its library raised; the message says which, and its family goes on.
        """
        to = self.settings.folder / f"played-{name}"
        reply = self._asked(
            self._family_of[name],
            report,
            name=name,
            load=load.to_dict(),
            warmup=None if warmup is None else warmup.to_dict(),
            limits=dataclasses.asdict(limits),
            pool_tokens=POOL_TOKENS,
            keep=kept_requests(load),
            most_seconds=most_seconds,
            to=str(to),
        )
        if "error" in reply:
            raise WorkerLost(reply["error"])
        outcomes = [Outcome.from_dict(values) for values in json.loads(pathlib.Path(f"{to}.json").read_bytes())]
        facts = reply["facts"] | {"cut_off": reply["cut_off"]}
        played = Played(outcomes, reply["seconds"], reply["interrupted"], facts)
        return played, {"rows": reply["rows"], "same_alone": reply["same_alone"], "outputs": np.load(f"{to}.npy")}

    def check(self, name: str, kept: dict[str, Any]) -> Checked:
        """Compares what a turn kept with the reference, which takes seconds for a large layer."""
        if self.config.capacity_factor is not None:  # what is dropped depends on the batch
            return Checked()
        found = Checked(same_alone=kept["same_alone"])
        if name == OURS and found.same_alone is False:
            found.wrong = "wrong: a request's output depends on the other requests of its batches"
        if kept["rows"]:
            found.rows, found.relative_l2 = self._error(name, kept["rows"], kept["outputs"])
            bound = workload.bound(self.config)
            if found.relative_l2 is not None and not found.relative_l2 <= bound:
                found.wrong = f"wrong: relative L2 error {found.relative_l2:.1e} is above {bound:.0e}"
        return found

    def _error(self, name: str, rows: list[int], outputs: Any) -> tuple[int, float | None]:
        """How many rows were compared, and their error."""
        x = to_float32(HostArray(self._pool.data[rows], self._pool.dtype))
        checks = workload.answers(self.settings.folder, x)
        clear = checks.rows[0]
        if not clear:
            return 0, None
        got = to_float32(HostArray(outputs[clear], self._pool.dtype))
        return len(clear), workload.relative_l2(got, (checks.expected if name == OURS else checks.whole)[0])

    def _asked(self, family: str, report: Callable[[int], None], **arguments: Any) -> dict[str, Any]:
        player = self._player(family)
        try:
            return player.play(report, **arguments)
        except WorkerLost:
            del self._players[family]
            raise

    def close(self) -> None:
        """Ends all processes."""
        for player in self._players.values():
            player.close()
        self._players = {}

    def __enter__(self) -> Layers:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def kept_requests(load: Load) -> list[int]:
    """Requests whose outputs are compared: the first, and some soon after."""
    count = min(load.requests or _KEPT_AMONG, _KEPT_AMONG)
    return sorted({math.floor(i) for i in np.linspace(0, count - 1, _KEPT_REQUESTS)})
