"""Every exception that a user of moegen can meet; each message is one readable sentence."""

from __future__ import annotations

from collections.abc import Iterable


class MoegenError(Exception):
    """Base of all errors that moegen raises on purpose."""


class ConfigError(MoegenError, ValueError):
    """A layer configuration is impossible, or a model's config asks for what moegen cannot honour."""


class TargetError(MoegenError, ValueError):
    """A compilation target is unknown or cannot be served on this machine."""


class ScheduleError(MoegenError, ValueError):
    """Schedule knobs are illegal for a workload (a rejected candidate, not a programming error)."""


class BuildError(MoegenError, RuntimeError):
    """Emission, compilation or linking failed; nothing was left behind."""


class EmulationError(MoegenError, RuntimeError):
    """A CUDA kernel did on the emulated device what a device refuses, or its source uses what is not emulated."""


def without_compiler(missing: ModuleNotFoundError) -> BuildError:
    """What to say when a package of the `[build]` extra is not installed."""
    return BuildError(f"building needs the compiler ({missing.name} is not installed): pip install 'moegen[build]'")


class VerificationError(MoegenError, RuntimeError):
    """A compiled module does not agree with the float64 reference."""


class ArtifactError(MoegenError, RuntimeError):
    """An artifact is missing, damaged, made for another machine, or by a newer moegen."""


class WeightsError(MoegenError, ValueError):
    """Weights are missing, superfluous, or of the wrong shape or dtype."""


class InputError(MoegenError, ValueError):
    """An argument of a layer call has the wrong shape, dtype, device or value."""


class DistributedError(MoegenError, RuntimeError):
    """Several processes do not make one layer: one of them is gone or stuck, failed, or disagrees with the others.

    Args:
        ranks: those that are to blame, as far as that is known.
    """

    def __init__(self, message: str, ranks: Iterable[int] = ()) -> None:
        super().__init__(message)
        self.ranks = tuple(ranks)


class MeasureError(MoegenError, RuntimeError):
    """A benchmark cannot be run, or its results cannot be read."""


class PlaceLost(MeasureError):
    """A place that measures (a server of TVM's RPC) is gone; what it was measuring can be measured elsewhere."""


class CandidateError(MeasureError):
    """A candidate cannot be measured: it crashed, hung or failed, and nothing but itself was lost.

    Args:
        status: `runtime` or `timeout`, as a tuning record says it.
    """

    def __init__(self, message: str, status: str) -> None:
        super().__init__(message)
        self.status = status


class RecordError(MoegenError, RuntimeError):
    """Tuning records cannot be read or written, or another run is writing them."""


class ReportError(MoegenError, ValueError):
    """What a report is made of is missing or malformed, or nothing is there to draw it with."""


def without_pictures(missing: ModuleNotFoundError) -> ReportError:
    """What to say when a package of the `[report]` extra is not installed."""
    return ReportError(f"a report needs what draws its pictures ({missing.name} is not installed): pip install 'moegen[report]'")


def without_rpc(missing: ModuleNotFoundError) -> MeasureError:
    """What to say when a package of the `[rpc]` extra is not installed."""
    return MeasureError(f"measuring on other machines needs TVM's RPC ({missing.name} is not installed): pip install 'moegen[rpc]'")


def without_client(missing: ModuleNotFoundError) -> MeasureError:
    """What to say when a package of the `[client]` extra is not installed."""
    return MeasureError(f"asking a server needs a client ({missing.name} is not installed): pip install 'moegen[client]'")
