"""moegen: Mixture-of-Experts kernels, generated, compiled and verified ahead of time."""
import pathlib
_root = pathlib.Path(__file__).resolve().parent
if not (_root / "schedules").is_dir():
    __path__.append(str(_root.parent))
