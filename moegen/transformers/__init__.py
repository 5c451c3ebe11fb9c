"""Hugging Face transformers' models with their experts on compiled artifacts.

    import moegen.transformers
    model = AutoModelForCausalLM.from_pretrained(folder, experts_implementation="moegen")  # or
    model.set_experts_implementation("moegen")

Importing this registers the implementation. Routers, shared experts and everything else stay the model's; of each layer, the
routed experts run on an artifact, which is found in the user's store by the layer's sizes, dtype and activation, or built there at
first use, in a process of its own. On CUDA devices it has to be there.

**Memory.** Weights are packed at a layer's first call, and torch's copy stays, so that experts take twice their memory; `release`
gives torch's copy back. Parameters that change are packed again at the next call, which takes a while.

**Gradients.** Under autograd the forward pass is the artifact's, and the backward pass is torch's, through the library's grouped
products. Wrap inference in `torch.no_grad()` or `torch.inference_mode()`, as `generate` does, and nothing is kept for it.

**Threads.** As many as torch has: `torch.set_num_threads` holds for both.

What moegen has no kernel for is an error that names the field, at the first call: nothing falls back to something slower silently.
"""

from __future__ import annotations

try:
    import torch as _torch  # noqa: F401
    import transformers as _transformers  # noqa: F401
except ModuleNotFoundError as missing:
    raise ModuleNotFoundError(
        f"moegen.transformers needs {missing.name}, which is not installed: pip install 'moegen[transformers]'", name=missing.name
    ) from None

from .implementation import NAME, pack, register, release

register()
__all__ = ["NAME", "pack", "register", "release"]
