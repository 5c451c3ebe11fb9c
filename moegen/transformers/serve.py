"""`transformers serve` with the models' experts on moegen.

    python -m moegen.transformers.serve FOLDER --host 127.0.0.1 --port 8000 [any option of `transformers serve`]

This is the library's own command and server. It has no option for the experts implementation, so that its manager of models is
given one more thing to do: before the first request, set the implementation of a loaded model and pack its experts, building
what is missing. Models without experts are served as they are. What moegen cannot run is an error when the model is loaded.
"""

from __future__ import annotations

import logging
import sys
from typing import Any

from transformers.cli.serving import model_manager
from transformers.utils.import_utils import is_serve_available

from ..display import size
from ..errors import ConfigError, MoegenError
from .implementation import NAME, experts_of, pack

_logger = logging.getLogger(__package__)


class ExpertsManager(model_manager.ModelManager):
    """The library's manager of models, whose models run their experts on moegen."""

    def load_model_and_processor(self, *arguments: Any, **named: Any) -> tuple[Any, Any]:
        """As the library's; a model's experts are set and packed the first time."""
        model, processor = super().load_model_and_processor(*arguments, **named)
        if next(experts_of(model), None) is not None and NAME not in model.get_experts_implementation().values():
            model.set_experts_implementation(NAME)
            _logger.warning("moegen: packed %s of experts of %s", size(pack(model)), model.name_or_path)
        return model, processor


def main(arguments: list[str] | None = None) -> None:
    """Runs the library's command; `arguments` are those after `serve`.

    Raises:
        ConfigError: what the library serves with is not installed.
        MoegenError: moegen cannot run the experts of a model that is loaded before requests come.
    """
    if not is_serve_available():
        raise ConfigError("serving needs fastapi, uvicorn, pydantic and openai: pip install 'moegen[serving]'")
    from transformers.cli.transformers import app  # here, because it imports what was just asked for

    model_manager.ModelManager = ExpertsManager  # the command looks it up there when it runs
    app(["serve", *(sys.argv[1:] if arguments is None else arguments)], prog_name="python -m moegen.transformers.serve")


if __name__ == "__main__":
    try:
        main()
    except MoegenError as error:
        sys.exit(f"moegen.transformers.serve: {error}")
