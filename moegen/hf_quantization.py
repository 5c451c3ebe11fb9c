"""From the `quantization_config` of a Hugging Face `config.json` to how `MoEConfig` says that experts' projections are stored.

Understood are mxfp4 (gpt-oss), gptq (AutoGPTQ, GPTQModel), awq (AutoAWQ) and compressed-tensors; a field that is left out takes
the default of transformers 5.23's configuration class, or of compressed-tensors' QuantizationArgs. What a model leaves in floats
(attention, the router) does not concern the layer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .errors import ConfigError
from .hf_source import Source
from .storage import WEIGHT_GROUPS

Fields = dict[str, Any]

_WAY_OUT = "dequantize the checkpoint and drop quantization_config; weight_dtype='int8' then quantizes its weights on packing"


def low_bit_fields(model_type: str, layers: Sequence[Mapping[str, Any]], dtype: str) -> Fields:
    """Keyword arguments of `MoEConfig` for the stored form of the experts' projections; empty without a quantization_config.

    Args:
        model_type: what complaints start with.
        layers: the configuration, inner ones first; one at most has a quantization_config that counts, the first.
        dtype: the model's storage type, in which compressed-tensors keeps scales.

    Raises:
        ConfigError: the method or one of its fields is not what moegen can honour.
    """
    raw = next((layer["quantization_config"] for layer in layers if layer.get("quantization_config") is not None), None)
    if raw is None:
        return {}
    outer = Source(model_type, {"quantization_config": raw})
    if not isinstance(raw, Mapping):
        raise outer.reject("quantization_config", f"an object ({_WAY_OUT})")
    s = Source(f"{model_type}: quantization_config", raw)
    method = raw.get("quant_method")
    if not isinstance(method, str) or method not in _METHODS:
        raise s.reject("quant_method", f"{', '.join(_METHODS)}, or weights in float32, bfloat16 or float16 ({_WAY_OUT})")
    return _METHODS[method](s, dtype)


def _mxfp4(s: Source, dtype: str) -> Fields:
    return {"weight_dtype": "mxfp4"}


def _gptq(s: Source, dtype: str) -> Fields:
    bits, group = s.integer("bits"), s.integer("group_size", default=128)
    s.must_be("checkpoint_format" if "checkpoint_format" in s.raw else "format", "gptq", "gptq_v2", None)
    s.must_be("pack_dtype", "int32", None)
    s.must_be("is_marlin_format", False, None)
    if s.flag("desc_act", False) and group != -1:
        raise ConfigError(
            f"{s.where}: desc_act=True (act-order) puts the inputs of a group apart, which kernels with consecutive groups cannot "
            f"honour; quantize with desc_act=False, or {_WAY_OUT}"
        )
    dynamic = s.raw.get("dynamic") or {}
    if not isinstance(dynamic, Mapping) or any(not str(modules).startswith("-:") for modules in dynamic):  # "-:" leaves them out
        raise s.reject("dynamic", f"one form for all experts ({_WAY_OUT})")
    return _integers(s, bits, group, not s.flag("sym", True), "float16")  # both packers keep scales in half precision


def _awq(s: Source, dtype: str) -> Fields:
    name = "version" if "version" in s.raw else "format"
    if str(s.raw.get(name, "gemm")).lower() != "gemm":
        raise s.reject(name, "'gemm'")
    if s.raw.get("backend") == "llm-awq":  # whose arrays have another order
        raise s.reject("backend", "AutoAWQ's form, 'gemm'")
    if s.integer("bits", "w_bit", default=4) != 4:
        raise s.reject("bits" if "bits" in s.raw else "w_bit", "4")
    return _integers(s, 4, s.integer("group_size", "q_group_size", default=128), s.flag("zero_point", True), "float16")


def _compressed_tensors(s: Source, dtype: str) -> Fields:
    s.must_be("format", "pack-quantized", "int-quantized", None)
    s.must_be("quantization_status", "compressed", None)
    sparsity = s.raw.get("sparsity_config")
    if sparsity and (not isinstance(sparsity, Mapping) or sparsity.get("format") not in (None, "dense")):
        raise s.reject("sparsity_config", "dense weights")
    ignored = s.raw.get("ignore") or ()
    if not isinstance(ignored, Sequence) or any("experts" in str(name).replace("shared_experts", "") for name in ignored):
        raise s.reject("ignore", f"names of other modules than the experts, which are quantized together ({_WAY_OUT})")
    groups = s.raw.get("config_groups")
    if not isinstance(groups, Mapping) or not groups:
        raise s.reject("config_groups", "an object with a group")
    found = [_config_group(f"{s.where}: config_groups.{name}", group, dtype) for name, group in groups.items()]
    if any(fields != found[0] for fields in found):
        raise s.reject("config_groups", f"one form for all experts ({_WAY_OUT})")
    return found[0]


def _config_group(where: str, group: Any, dtype: str) -> Fields:
    """One of `config_groups`: weights, input_activations and output_activations, each a dict of QuantizationArgs or null."""
    s = Source(where, group if isinstance(group, Mapping) else {})
    if not isinstance(s.raw.get("weights"), Mapping):
        raise s.reject("weights", f"an object ({_WAY_OUT})")
    s.must_be("output_activations", None)
    s.must_be("format", "pack-quantized", "int-quantized", None)
    w = Source(f"{where}.weights", s.raw["weights"])
    w.must_be("type", "int")
    w.must_be("dynamic", False, None)
    w.must_be("actorder", None, False, "static", "weight")
    size = w.raw.get("group_size")
    strategy = w.raw.get("strategy") or ("tensor" if size is None else "channel" if size == -1 else "group")
    if strategy not in ("group", "channel"):
        raise ConfigError(f"{w.where}: strategy={strategy!r} is not supported; supported: 'group', 'channel' ({_WAY_OUT})")
    per_group = w.integer("group_size") if strategy == "group" else -1
    fields = _integers(w, w.integer("num_bits", default=8), per_group, not w.flag("symmetric", True), dtype, bits_name="num_bits")
    activations = s.raw.get("input_activations")
    if activations is None:
        return fields
    if not isinstance(activations, Mapping):
        raise s.reject("input_activations", "an object or null")
    a = Source(f"{where}.input_activations", activations)
    a.must_be("type", "int")
    a.must_be("num_bits", 8)
    a.must_be("symmetric", True)
    for name, value in (("strategy", "token"), ("dynamic", True)):
        if a.raw.get(name) != value:
            raise a.reject(name, f"{value!r}: a scale for each token, found when the layer runs")
    if fields["weight_dtype"] != "int8":
        raise w.reject("num_bits", "8 where activations are rounded to int8")
    return fields | {"activation_dtype": "int8"}


def _integers(s: Source, bits: int, group: int, zero_point: bool, scale_dtype: str, bits_name: str = "bits") -> Fields:
    """The fields of int8 and int4; a group of -1 is the whole row."""
    if bits not in (4, 8):
        raise s.reject(bits_name, f"4, 8 ({_WAY_OUT})")
    if group == -1 and bits == 4:
        raise ConfigError(f"{s.where}: a scale for each row (group_size -1) is not supported with 4 bits; {_WAY_OUT}")
    if group not in (-1, *WEIGHT_GROUPS[1:]):
        raise s.reject("group_size", f"{', '.join(map(str, WEIGHT_GROUPS[1:]))}, or -1 with 8 bits ({_WAY_OUT})")
    return {
        "weight_dtype": f"int{bits}",
        "weight_group": max(group, 0),
        "weight_zero_point": zero_point,
        "scale_dtype": scale_dtype,
    }


_METHODS: dict[str, Callable[[Source, str], Fields]] = {
    "mxfp4": _mxfp4,
    "gptq": _gptq,
    "awq": _awq,
    "compressed-tensors": _compressed_tensors,
}
