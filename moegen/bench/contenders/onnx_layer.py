"""ONNX Runtime's com.microsoft MoE operator behind a product for the router's logits, in float32."""

from __future__ import annotations

import pathlib
import tempfile
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper

from ...arrays import HostArray, to_float32
from ...config import MoEConfig
from .family import Family, Settings

NAME = "onnxruntime"
_ACTIVATIONS = {"relu": "relu", "silu": "silu", "gelu_tanh": "gelu", "swiglu": "swiglu", "swiglu_clamped": "swiglu"}


def obstacle(config: MoEConfig) -> str:
    """Why the operator cannot compute such a layer, or nothing."""
    c = config
    reasons = {
        f"its MoE operator takes float32 on a CPU, not {c.dtype}": c.dtype != "float32",
        "has no expert capacity": c.capacity_factor is not None,
        f"its MoE operator has no {c.activation}": c.activation not in _ACTIVATIONS,
        f"its MoE operator has no {c.gating} gating": c.gating == "sigmoid",
        "its MoE operator has no correction bias": c.correction_bias,
        "its MoE operator has no routing groups": c.n_group != c.topk_group,
        "its MoE operator has no shared expert": bool(c.shared_intermediate),
        "its MoE operator weighs outputs, not inputs": c.weight_on_input,
    }
    return next((reason for reason, applies in reasons.items() if applies), "")


class OnnxLayer(Family):
    """One session; the weights are its own."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        if reason := obstacle(self.config):
            self.obstacles = {NAME: reason}
            return
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads, options.log_severity_level = settings.threads, 1, 3
        with tempfile.TemporaryDirectory(dir=settings.folder) as folder:
            model = self._model(pathlib.Path(folder))
            self.session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        self.calls = {NAME: self._call}

    def _call(self, x: HostArray, out: HostArray) -> None:
        out.data[...] = self.session.run(None, {"x": x.data})[0]

    def _model(self, folder: pathlib.Path) -> str:
        """The path of a model whose large weights lie in files beside it."""
        c, given = self.config, self.weights()
        weights = {name: to_float32(array) for name, array in given.items()}
        inner = {"router": np.ascontiguousarray(weights["router.weight"].T)}
        if c.router_bias:
            inner["router_bias"] = weights["router.bias"]
        if c.expert_bias:
            inner["bias1"], inner["bias2"] = self._first(weights, "bias"), weights["experts.down.bias"]
        if c.routed_scaling != 1.0:
            inner["scaling"] = np.array(c.routed_scaling, np.float32)
        outer = {"w1": self._first(weights, "weight"), "w2": weights["experts.down.weight"]}
        graph = helper.make_graph(
            self._nodes(set(inner)),
            "moe",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["T", c.hidden])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["T", c.hidden])],
            [onnx.numpy_helper.from_array(array, name) for name, array in inner.items()]
            + [_outside(folder, name, array) for name, array in outer.items()],
        )
        domains = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
        path = folder / "moe.onnx"
        path.write_bytes(helper.make_model(graph, opset_imports=domains, ir_version=10).SerializeToString())
        return str(path)

    def _first(self, weights: dict[str, Any], kind: str) -> Any:
        """gate and up, interleaved row by row as the operator wants them, or up alone."""
        up = weights[f"experts.up.{kind}"]
        if not self.config.gated:
            return up
        pair = np.stack([weights[f"experts.gate.{kind}"], up], axis=2)  # [E, I, 2, ...]
        return pair.reshape(pair.shape[0], -1, *pair.shape[3:])

    def _nodes(self, inner: set[str]) -> list[Any]:
        c = self.config
        nodes = [helper.make_node("MatMul", ["x", "router"], ["plain" if c.router_bias else "logits"])]
        if c.router_bias:
            nodes.append(helper.make_node("Add", ["plain", "router_bias"], ["logits"]))
        settings: dict[str, Any] = {
            "k": c.top_k,
            "activation_type": _ACTIVATIONS[c.activation],
            "normalize_routing_weights": int(c.renormalize or c.gating == "topk_softmax"),
        }
        if c.gated:
            settings["swiglu_fusion"] = 1
        if c.activation == "swiglu_clamped":
            settings |= {"activation_alpha": c.swiglu_alpha, "activation_beta": 1.0, "swiglu_limit": c.swiglu_limit}
        biases = ["bias1" if c.expert_bias else "", "w2", "bias2" if c.expert_bias else ""]
        scaled = "scaling" in inner
        nodes.append(
            helper.make_node(
                "MoE", ["x", "logits", "w1", *biases], ["routed" if scaled else "y"], domain="com.microsoft", **settings
            )
        )
        if scaled:
            nodes.append(helper.make_node("Mul", ["routed", "scaling"], ["y"]))
        return nodes


def _outside(folder: pathlib.Path, name: str, array: Any) -> Any:
    """A tensor whose values are in a file of its own: a model may not exceed 2 GiB."""
    np.ascontiguousarray(array).tofile(folder / name)
    tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=list(array.shape), data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value=name)
    return tensor


def open_family(settings: Settings) -> Family:
    """A session of ONNX Runtime."""
    return OnnxLayer(settings)
