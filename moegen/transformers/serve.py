"""`transformers serve` with the models' experts on moegen.

    python -m moegen.transformers.serve FOLDER --host 127.0.0.1 --port 8000 [any option of `transformers serve`]

This is the library's own command and server. It has no option for the experts implementation, so that its manager of models is given
one more thing to do: set a model's implementation when it is loaded, and pack its experts (which builds what is missing) before the
first request. Models without experts are served as they are. What moegen cannot run is an error when the model is loaded.
"""

from __future__ import annotations

import sys
from typing import Any

from transformers.cli.serving import model_manager
from transformers.utils.import_utils import is_serve_available

from ..errors import ConfigError
from .implementation import NAME, experts_of, pack


class ExpertsManager(model_manager.ModelManager):
    """The library's manager of models, whose models run their experts on moegen."""

    def load_model_and_processor(self, *arguments: Any, **named: Any) -> tuple[Any, Any]:
        """As the library's; a model's experts are set and packed the first time."""
        model, processor = super().load_model_and_processor(*arguments, **named)
        if next(experts_of(model), None) is not None and NAME not in model.get_experts_implementation().values():
            model.set_experts_implementation(NAME)
            pack(model)
        return model, processor


def main(arguments: list[str] | None = None) -> None:
    """Runs the library's command; `arguments` are those after `serve`.

    Raises:
        ConfigError: what the library serves with is not installed.
    """
    if not is_serve_available():
        raise ConfigError("serving needs fastapi, uvicorn, pydantic and openai: pip install 'moegen[serving]'")
    from transformers.cli.transformers import app  # here, because it imports what was just asked for

    model_manager.ModelManager = ExpertsManager  # the command looks it up there when it runs
    app(["serve", *(sys.argv[1:] if arguments is None else arguments)], prog_name="moegen.transformers")


if __name__ == "__main__":
    main()
