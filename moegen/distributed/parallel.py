"""`ExpertParallel`: one Mixture-of-Experts layer whose experts are on several processes."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..config import MoEConfig
from ..errors import ConfigError, DistributedError, InputError
from ..routing import Routing
from ..target import usable_processors
from .exchange import Directory, Incoming, Outgoing, add_up, by_row, incoming, within_capacity
from .link import Pending, link_of, meeting_of, ranks_of
from .meeting import described
from .placement import Placement, placement_of
from .share import share_of

PARTS = ("router", "sort", "send", "shared", "experts", "return", "combine")
MAX_SECONDS = 1e7
_FORWARD, _EXPERTS, _PROBLEM = 1, 2, 3


class ExpertParallel(torch.nn.Module):  # type: ignore[misc]
    """A Mixture-of-Experts layer on several processes: each holds some experts, and calls with tokens of its own.

    Constructing it and calling it are collective: every rank of the group does so, in the same order. A call takes as long as
    the slowest rank. Tokens go to the ranks that hold their experts (a row travels once to each), compiled layers compute there,
    and results come back to be added up in float32, the shared expert first and then the experts in ascending order, as one process
    does it. What fails on one rank is an error on all of them, and so is a rank that is gone or stuck.

    **Equal to one process.** With `exact` every choice's result comes back by itself. In float32 the output is bitwise that of
    `moegen.load(...).bind(...)` in one process, wherever the artifact and torch's `addcmul` both use fused multiply-adds (x86-64-v3
    and later), and in any case bitwise the same for any number of ranks, any placement and any division of the tokens. In bfloat16
    and float16 each expert's result is rounded once more before it is weighed: the difference to one process is at most
    u * (sum_k |w_k d_k| + 3 |y|) for each number, u being 2^-8 and 2^-11. Without `exact` a rank adds up the results that it has
    for a token, in float32, and sends their sum rounded to the layer's type: fewer bytes come back, the sum depends on the
    placement, and the bound is twice that.

    Args:
        config: the whole layer. With a capacity factor an expert takes the first tokens of all ranks, by rank and position.
        weights, prefix, layout, gate_up, checkpoint_format: the whole layer's, as in `moegen.runtime.Module.bind`; of a file, only
            what this rank holds is read.
        placement: the experts of each rank; None for near-equal contiguous parts. Ranks are those of the group in ascending order.
        group: a process group of torch.distributed; None for all ranks. The layer makes connections of its own, which the layers of
            a group share: gloo on CPUs, NCCL for CUDA.
        exact: see above.
        store: where the artifacts of `local_configs` are looked for and, for this machine's processor, built when they are not
            there (in another process; one rank of a machine builds, the others wait).
        target: `llvm` or `cuda`.
        device: the CUDA device, for `cuda`.
        threads: threads of this rank's layers, on CPUs; None for all processors that it may use, divided by LOCAL_WORLD_SIZE.
        timeout_s: seconds that a rank waits for the others in one exchange, which must suffice for computing the slowest share.
        start_timeout_s: seconds for building, and that a rank waits for the others to construct the layer.

    Raises:
        DistributedError: there is no process group, a rank is missing or failed, or ranks disagree on anything that matters.
        ConfigError, ArtifactError, BuildError, WeightsError: what failed on this rank; the others get a DistributedError.
    """

    def __init__(
        self,
        config: MoEConfig,
        weights: Mapping[str, Any] | str | os.PathLike[str],
        *,
        prefix: str = "",
        layout: str | None = None,
        gate_up: str | None = None,
        checkpoint_format: str | None = None,
        placement: Placement | Sequence[Sequence[int]] | None = None,
        group: Any = None,
        exact: bool = True,
        store: str | os.PathLike[str] | None = None,
        target: str = "llvm",
        device: int = 0,
        threads: int | None = None,
        timeout_s: float = 60.0,
        start_timeout_s: float = 600.0,
    ) -> None:
        super().__init__()
        self.config, self.exact = config, exact
        self.device = torch.device(f"cuda:{device}" if target == "cuda" else "cpu")
        self._dtype: torch.dtype = getattr(torch, config.dtype)
        ranks = ranks_of(group)
        meeting = meeting_of(ranks)
        with _Problem() as problem:
            _check_seconds(timeout_s=timeout_s, start_timeout_s=start_timeout_s)
            self.placement = placement_of(config, len(ranks) if placement is None else placement)
            if self.placement.ranks != len(ranks):
                raise ConfigError(f"placement has {self.placement.ranks} ranks, the group has {len(ranks)}")
            chosen = {"placement": str(self.placement), "exact": exact, "device": self.device.type, "timeout_s": timeout_s}
        waiting_s = start_timeout_s if problem.error is None else 0.0
        meeting.agree("layer", {} if problem.error else config.to_dict() | chosen, problem.error, waiting_s)
        with _Problem() as problem:
            self._share = share_of(
                config, self.placement, meeting.rank, weights,
                prefix=prefix, layout=layout, gate_up=gate_up, checkpoint_format=checkpoint_format, store=store, target=target,
                device=device, threads=threads if threads is not None else _threads(), limit_s=start_timeout_s,
            )  # fmt: skip
        replicated = {} if problem.error else self._share.replicated
        meeting.agree("weights", replicated, problem.error, start_timeout_s)
        self._link = link_of(ranks, self.device, meeting, timeout_s, start_timeout_s)
        self._directory = Directory(self.placement, self.device)
        self._number, self._calls, self._lock = self._link.next_layer(), 0, threading.Lock()

    @property
    def rank(self) -> int:
        """This process among the ranks of the layer."""
        return self._link.rank

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The layer's output for this rank's tokens, of x's shape.

        Args:
            x: [T, H] or [batch, sequence, H] of the layer's dtype; T may be 0 and differ between ranks.

        Raises:
            InputError: this rank's x has the wrong shape, dtype or device, or wants a gradient.
            DistributedError: another rank failed, is gone or stuck.
        """
        return self._call(_Clock(), x, None, None)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def experts(self, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """The routed experts alone, with anybody's routing; capacity applies, the shared expert does not.

        Args:
            x: as in `forward`.
            ids: integers [T, K] in [0, E).
            weights: floats [T, K].

        Raises:
            InputError: an argument of this rank's has the wrong shape, dtype, device or value.
            DistributedError: another rank failed, is gone or stuck.
        """
        return self._call(_Clock(), x, ids, weights)

    def route(self, x: torch.Tensor) -> Routing:
        """The router alone, for this rank's tokens; not collective. Nothing is dropped: capacity counts the tokens of all ranks.

        Raises:
            InputError: the wrong shape, dtype or device.
        """
        routing: Routing = self._share.router.route(self._checked(x))
        return routing

    def profile(self, x: torch.Tensor) -> dict[str, float]:
        """Seconds that this rank spends in each part of one call; collective. `send` and `return` are the exchange, with waiting.

        Raises:
            InputError, DistributedError: as `forward`.
        """
        clock = _Clock(self.device)
        self._call(clock, x, None, None)
        return clock.seconds

    # ---------------------------------------------------------------- inside

    def _call(self, clock: _Clock, x: Any, ids: Any, weights: Any) -> torch.Tensor:
        """One collective call. Until the headers have been exchanged, what fails is kept: the others wait for this rank's."""
        with self._lock:
            self._link.check()
            self._calls += 1
            rows = outgoing = None
            with _Problem() as problem:
                rows = self._checked(x)
                chosen, factors = self._routed(rows) if ids is None else self._given(len(rows), ids, weights)
                clock.ends("router")
                outgoing = self._directory.outgoing(chosen, factors)
                clock.ends("sort")
            try:
                headers = self._headers(_FORWARD if ids is None else _EXPERTS, rows, outgoing, problem.error)
                assert rows is not None
                assert outgoing is not None
                return self._computed(clock, rows, outgoing, headers, with_shared=ids is None).view(x.shape)
            except BaseException as error:  # such as out of memory, or Ctrl-C
                if error is not problem.error and not isinstance(error, DistributedError):
                    self._link.leave(error)  # so that the others do not wait for what will not come
                raise

    def _headers(
        self, kind: int, rows: torch.Tensor | None, outgoing: Outgoing | None, problem: BaseException | None
    ) -> list[list[int]]:
        """(rows, choices, T) that each rank announces; where one has failed, every rank raises."""
        link = self._link
        kind = kind if problem is None else _PROBLEM
        tokens = 0 if rows is None else len(rows)
        counts = [[0, 0]] * link.size if outgoing is None else list(zip(outgoing.row_counts, outgoing.choice_counts, strict=True))
        said = link.all_headers([[kind, self._number, self._calls, *pair, tokens] for pair in counts], self.device)
        if any(line[0] == _PROBLEM for line in said):
            reasons = link.all_reasons(described(problem), self.device)
            if problem is not None:
                raise problem
            failed = [rank for rank, line in enumerate(said) if line[0] == _PROBLEM]
            raise DistributedError("; ".join(f"rank {rank} failed: {reasons[rank]}" for rank in failed), failed)
        for rank, line in enumerate(said):
            if line[:3] != said[0][:3]:
                error = DistributedError(
                    f"rank {rank} and rank 0 call different layers or methods: all ranks call the same", [rank]
                )
                link.leave(error)
                raise error
        return [line[3:] for line in said]

    def _computed(
        self, clock: _Clock, rows: torch.Tensor, outgoing: Outgoing, headers: list[list[int]], with_shared: bool
    ) -> torch.Tensor:
        row_counts, choice_counts, tokens = (list(column) for column in zip(*headers, strict=True))
        notes = self._link.all_to_all(outgoing.notes, outgoing.choice_counts, choice_counts, "exchanging choices")
        sent = self._link.all_to_all(rows[outgoing.rows], outgoing.row_counts, row_counts, "exchanging token rows")
        clock.ends("send")
        sums = self._shared(rows) if with_shared else torch.zeros(rows.shape, device=self.device)
        clock.ends("shared")
        choices, received = incoming(notes.wait(), row_counts, choice_counts), sent.wait()
        clock.ends("send")
        kept = None
        if self.config.capacity_factor is not None:
            kept = within_capacity(choices.expert, self.config.capacity(sum(tokens)))
        results = self._results(received, choices, kept)
        if not self.exact:
            results = self._summed(results, choices, kept, len(received))
        clock.ends("experts")
        back = self._returned(results, outgoing, row_counts, choice_counts).wait()
        clock.ends("return")
        self._combine(sums, back, outgoing)
        y = sums.to(self._dtype)
        clock.ends("combine")
        return y

    def _results(self, rows: torch.Tensor, choices: Incoming, kept: torch.Tensor | None) -> torch.Tensor:
        """[C, H]: what the experts of this rank make of each choice's row, not weighed unless the weight is the input's."""
        if self._share.experts is None or not len(choices.row):
            return rows.new_zeros((len(choices.row), self.config.hidden))
        weights = choices.weight if self.config.weight_on_input else torch.ones_like(choices.weight)
        if kept is None:
            return self._of_experts(rows[choices.row], choices.expert, weights)
        results = rows.new_zeros((len(choices.row), self.config.hidden))
        results[kept] = self._of_experts(rows[choices.row[kept]], choices.expert[kept], weights[kept])
        return results

    def _of_experts(self, rows: torch.Tensor, expert: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        assert self._share.experts is not None
        made: torch.Tensor = self._share.experts.experts(rows, expert.int()[:, None], weights[:, None])
        return made

    def _summed(self, results: torch.Tensor, choices: Incoming, kept: torch.Tensor | None, rows: int) -> torch.Tensor:
        """[rows, H]: the results of each row added up."""
        index, weights = by_row(choices, kept, rows, self.config.top_k)
        sums = torch.zeros((rows, self.config.hidden), device=self.device)
        add_up(sums, results, index, None if self.config.weight_on_input else weights, complete=False)
        return sums.to(self._dtype)

    def _returned(self, results: torch.Tensor, outgoing: Outgoing, row_counts: list[int], choice_counts: list[int]) -> Pending:
        what = "exchanging results"
        if self.exact:
            return self._link.all_to_all(results, choice_counts, outgoing.choice_counts, what)
        return self._link.all_to_all(results, row_counts, outgoing.row_counts, what)

    def _combine(self, sums: torch.Tensor, back: torch.Tensor, outgoing: Outgoing) -> None:
        if self.exact:
            add_up(sums, back, outgoing.position, None if self.config.weight_on_input else outgoing.weights, complete=True)
            return
        row = outgoing.row_of[outgoing.position]
        repeated = (row[:, :, None] == row[:, None, :]).tril(-1).any(dim=2)  # a choice before it has the same row
        add_up(sums, back, torch.where(repeated, -1, row), None, complete=False)

    def _shared(self, rows: torch.Tensor) -> torch.Tensor:
        """float32 [T, H]: the shared expert's output, zeros without one."""
        shared = self._share.shared
        if shared is None or not len(rows):
            return torch.zeros(rows.shape, device=self.device)
        if self.config.shared_gate:
            made = shared(rows)
        else:
            ones = torch.ones((len(rows), 1), device=self.device)
            made = shared.experts(rows, torch.zeros_like(ones, dtype=torch.int32), ones)
        return made.float()

    def _routed(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        routing = self._share.router.route(rows)
        return routing.ids.long(), routing.weights

    def _given(self, tokens: int, ids: Any, weights: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """The caller's routing, checked here: a wrong id must not reach another rank."""
        expected = [tokens, self.config.top_k]
        for name, table in (("ids", ids), ("weights", weights)):
            if not isinstance(table, torch.Tensor):
                raise InputError(f"{name} must be a torch tensor, not {type(table).__name__}")
            if list(table.shape) != expected:
                raise InputError(f"{name} has shape {list(table.shape)}, expected {expected}")
            if table.device != self.device:
                raise InputError(f"{name} is on device {str(table.device)!r}, the layer is on {str(self.device)!r}")
        if ids.dtype.is_floating_point or ids.dtype.is_complex or ids.dtype is torch.bool:
            raise InputError(f"ids must be integers, not {_name(ids.dtype)}")
        if not weights.dtype.is_floating_point:
            raise InputError(f"weights must be floats, not {_name(weights.dtype)}")
        _refuse_gradient(weights, "weights")
        outside = ((ids < 0) | (ids >= self.config.experts)).nonzero()
        if len(outside):
            t, k = outside[0].tolist()
            raise InputError(f"ids[{t}, {k}]={int(ids[t, k])} must be between 0 and {self.config.experts - 1}")
        return ids.long(), weights.detach().float()

    def _checked(self, x: Any) -> torch.Tensor:
        """x as rows [T, H]."""
        if not isinstance(x, torch.Tensor):
            raise InputError(f"x must be a torch tensor, not {type(x).__name__}")
        hidden = self.config.hidden
        if x.dim() not in (2, 3) or x.shape[-1] != hidden:
            raise InputError(f"x has shape {list(x.shape)}, expected [T, {hidden}] or [batch, sequence, {hidden}]")
        if x.dtype != self._dtype:
            raise InputError(f"x has dtype {_name(x.dtype)}, this layer takes {self.config.dtype}: convert it first")
        if x.device != self.device:
            raise InputError(f"x is on device {str(x.device)!r}, the layer is on {str(self.device)!r}")
        _refuse_gradient(x, "x")
        return x.detach().reshape(-1, hidden)

    def extra_repr(self) -> str:
        return f"{self.config}, rank {self.rank} of {self._link.size}, {self.placement}"


class _Problem:
    """Keeps what fails inside, whatever it is, until the other ranks have been told."""

    error: Exception | None = None

    def __enter__(self) -> _Problem:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> bool:
        self.error = error if isinstance(error, Exception) else None
        return self.error is not None


class _Clock:
    """Seconds between marks; without a device nothing is measured."""

    def __init__(self, device: torch.device | None = None) -> None:
        self.device = device
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self._last = time.perf_counter()

    def ends(self, part: str) -> None:
        """A part ends here, and the next begins."""
        if self.device is None:
            return
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        now = time.perf_counter()
        self.seconds[part] += now - self._last
        self._last = now


def _refuse_gradient(tensor: torch.Tensor, name: str) -> None:
    if tensor.requires_grad and torch.is_grad_enabled():
        raise InputError(
            f"{name} requires a gradient, and the layer has none: call it under torch.inference_mode() or with {name}.detach()"
        )


def _check_seconds(**limits: float) -> None:
    for name, seconds in limits.items():
        if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not 0 < seconds < MAX_SECONDS:
            raise ConfigError(f"{name}={seconds!r} must be seconds above 0 and below {MAX_SECONDS:g}")


def _threads() -> int | None:
    """A share of the processors where a launcher such as torchrun says how many ranks this machine has; None for all."""
    ranks = os.environ.get("LOCAL_WORLD_SIZE", "")
    return max(1, usable_processors() // int(ranks)) if ranks.isdigit() and int(ranks) > 0 else None


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
