"""A Qwen3 model's configuration, read from config.json and validated field by field.

Nothing here has a silent default that changes the arithmetic: a size, ``rope_theta``, ``rms_norm_eps`` or
``tie_word_embeddings`` that is absent is an error, and so is every field that asks for something this compiler does not
do.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ir.errors import ConfigError

DTYPE_NAMES = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}
_MISSING = object()
_MAX_INT = 2**31 - 1  # the engine's meta structure holds 32-bit fields


@dataclass(frozen=True)
class Qwen3Config:
    """What config.json says; names are Hugging Face's. ``dtype`` is ``"f32"``, ``"f16"`` or ``"bf16"``."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float
    tie_word_embeddings: bool
    dtype: str
    eos_token_ids: tuple[int, ...] = ()
    bos_token_id: int | None = None
    pad_token_id: int | None = None

    def weight_shapes(self) -> dict[str, tuple[int, ...]]:
        """Every weight of the checkpoint with its shape (linear weights are [out, in]), in the order of their use."""
        hidden, inner, d = self.hidden_size, self.intermediate_size, self.head_dim
        q, kv = self.num_attention_heads * d, self.num_key_value_heads * d
        layer = {
            "input_layernorm": (hidden,),
            "self_attn.q_proj": (q, hidden),
            "self_attn.k_proj": (kv, hidden),
            "self_attn.v_proj": (kv, hidden),
            "self_attn.q_norm": (d,),
            "self_attn.k_norm": (d,),
            "self_attn.o_proj": (hidden, q),
            "post_attention_layernorm": (hidden,),
            "mlp.gate_proj": (inner, hidden),
            "mlp.up_proj": (inner, hidden),
            "mlp.down_proj": (hidden, inner),
        }
        shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocab_size, hidden)}
        for n in range(self.num_hidden_layers):
            shapes.update({f"model.layers.{n}.{name}.weight": shape for name, shape in layer.items()})
        shapes["model.norm.weight"] = (hidden,)
        if not self.tie_word_embeddings:
            shapes["lm_head.weight"] = (self.vocab_size, hidden)
        return shapes

    @property
    def parameters(self) -> int:
        """Number of stored weights' elements (a tied embedding counts once)."""
        return sum(math.prod(shape) for shape in self.weight_shapes().values())


def read_json(path: Path, error: type[Exception] = ConfigError) -> dict[str, Any]:
    """A JSON file that holds an object.

    Raises:
        error: the file is missing, unreadable, not JSON or not an object.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as failure:
        raise error(f"{path}: {failure.strerror}") from None
    except (UnicodeDecodeError, RecursionError) as failure:
        raise error(f"{path}: not valid JSON ({failure})") from None
    except json.JSONDecodeError as failure:
        raise error(f"{path}: not valid JSON ({failure})") from None
    if not isinstance(data, dict):
        raise error(f"{path}: holds a {type(data).__name__}, expected a JSON object")
    return data


def load_config(model_dir: str | Path) -> Qwen3Config:
    """Read config.json (and generation_config.json where there is one) of a Hugging Face directory.

    Raises:
        ConfigError: names the file and field, what was found and what was expected.
    """
    folder = Path(model_dir)
    if not folder.is_dir():
        raise ConfigError(
            f"{folder}: {'is not a folder' if folder.exists() else 'no such folder'}, "
            "expected a Hugging Face model directory"
        )
    fields = _Fields(folder / "config.json", read_json(folder / "config.json"))
    _refuse_unsupported(fields)
    hidden, heads = fields.count("hidden_size"), fields.count("num_attention_heads")
    kv_heads = fields.count("num_key_value_heads")
    if heads % kv_heads:
        fields.fail("num_key_value_heads", kv_heads, f"a divisor of num_attention_heads = {heads}")
    if fields.get("head_dim") is None:
        if hidden % heads:
            fields.fail(
                "head_dim",
                None,
                f"a number, because hidden_size = {hidden} is no multiple of num_attention_heads = {heads}",
            )
        head_dim = hidden // heads
    else:
        head_dim = fields.count("head_dim")
    if head_dim % 2:
        fields.fail("head_dim", head_dim, "an even number (rotary embedding turns pairs)")
    layers = fields.count("num_hidden_layers")
    _check_layer_types(fields, layers)
    return Qwen3Config(
        vocab_size=fields.count("vocab_size"),
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        intermediate_size=fields.count("intermediate_size"),
        max_position_embeddings=fields.count("max_position_embeddings"),
        rms_norm_eps=fields.number("rms_norm_eps", 0.0, 1.0),
        rope_theta=_rope_theta(fields),
        tie_word_embeddings=fields.flag("tie_word_embeddings"),
        dtype=_dtype(fields),
        eos_token_ids=_eos(folder, fields),
        bos_token_id=fields.token("bos_token_id"),
        pad_token_id=fields.token("pad_token_id"),
    )


class _Fields:
    """Typed access to a JSON object's fields; complaints name the file and the field."""

    def __init__(self, path: Path, data: Mapping[str, Any], prefix: str = "") -> None:
        self.path, self.data, self.prefix = path, data, prefix

    def fail(self, field: str, found: object, expected: str) -> None:
        shown = "is missing" if found is _MISSING else f"is {json.dumps(found, default=str)[:80]}"
        raise ConfigError(f"{self.path}: {self.prefix}{field} {shown}, expected {expected}")

    def get(self, field: str, default: Any = None) -> Any:
        return self.data.get(field, default)

    def count(self, field: str) -> int:
        value = self.data.get(field, _MISSING)
        if type(value) is not int or not 0 < value <= _MAX_INT:
            self.fail(field, value, "a positive whole number")
        return value

    def number(self, field: str, low: float, high: float) -> float:
        """A finite number with low < number < high."""
        value = self.data.get(field, _MISSING)
        if type(value) not in (int, float) or not low < value < high:
            self.fail(field, value, f"a number above {low:g}" + (f" and below {high:g}" if high < math.inf else ""))
        return float(value)

    def flag(self, field: str) -> bool:
        value = self.data.get(field, _MISSING)
        if type(value) is not bool:
            self.fail(field, value, "true or false")
        return value

    def token(self, field: str) -> int | None:
        value = self.data.get(field)
        if value is not None and (type(value) is not int or value < 0):
            self.fail(field, value, "a token id or null")
        return value

    def tokens(self, field: str) -> tuple[int, ...]:
        value = self.data.get(field)
        ids = [] if value is None else value if isinstance(value, list) else [value]
        if any(type(i) is not int or i < 0 for i in ids):
            self.fail(field, value, "a token id, a list of them or null")
        return tuple(ids)

    def require(self, field: str, allowed: tuple[Any, ...], expected: str) -> None:
        """Where the field is present, it must have one of these values."""
        value = self.data.get(field, _MISSING)
        if value is not _MISSING and not any(type(value) is type(a) and value == a for a in allowed):
            self.fail(field, value, expected)


def _refuse_unsupported(fields: _Fields) -> None:
    model_type = fields.get("model_type", _MISSING)
    if model_type != "qwen3":
        fields.fail("model_type", model_type, '"qwen3"')
    architectures = fields.get("architectures")
    if architectures and architectures != ["Qwen3ForCausalLM"]:
        fields.fail("architectures", architectures, '["Qwen3ForCausalLM"]')
    fields.require("hidden_act", ("silu",), '"silu"')
    fields.require("attention_bias", (False,), "false: biased attention is not supported")
    fields.require("use_sliding_window", (False, None), "false: sliding-window attention is not supported")
    fields.require("quantization_config", (None,), "none: quantized checkpoints are not supported")
    fields.require("partial_rotary_factor", (1, 1.0, None), "1: partial rotary embedding is not supported")
    for field in ("rope_scaling", "rope_parameters"):
        value = fields.get(field)
        if value is None:
            continue
        if not isinstance(value, dict):
            fields.fail(field, value, "an object or null")
        rope = _Fields(fields.path, value, field + ".")
        for key in ("rope_type", "type"):
            rope.require(key, ("default", None), '"default": scaled rotary embedding is not supported')
        rope.require("partial_rotary_factor", (1, 1.0, None), "1: partial rotary embedding is not supported")
        unknown = sorted(set(value) - {"rope_type", "type", "rope_theta", "partial_rotary_factor"})
        if unknown:
            rope.fail(
                unknown[0], value[unknown[0]], "no such field: scaled or per-layer rotary embedding is not supported"
            )


def _check_layer_types(fields: _Fields, layers: int) -> None:
    kinds = fields.get("layer_types")
    if kinds is not None and kinds != ["full_attention"] * layers:
        other = [k for k in kinds if k != "full_attention"] if isinstance(kinds, list) else [kinds]
        found = other[0] if other else f"{len(kinds)} entries"
        fields.fail("layer_types", found, f'"full_attention" for each of the {layers} layers')


def _rope_theta(fields: _Fields) -> float:
    parameters = fields.get("rope_parameters") or {}
    places = [
        f for f in (fields, _Fields(fields.path, parameters, "rope_parameters.")) if f.get("rope_theta") is not None
    ]
    if not places:
        fields.fail("rope_theta", fields.get("rope_theta", _MISSING), "a number above 0 (here or in rope_parameters)")
    values = [p.number("rope_theta", 0.0, math.inf) for p in places]
    if len(set(values)) > 1:
        fields.fail("rope_theta", values[0], f"the same as rope_parameters.rope_theta = {values[1]:g}")
    return values[0]


def _dtype(fields: _Fields) -> str:
    # Newer files say dtype, older ones torch_dtype; both may spell "torch.bfloat16".
    field = "dtype" if fields.get("dtype") is not None else "torch_dtype"
    value = fields.get(field, _MISSING)
    name = value.removeprefix("torch.") if isinstance(value, str) else value
    if name not in DTYPE_NAMES if isinstance(name, str) else True:
        fields.fail(field, value, "one of " + ", ".join(DTYPE_NAMES))
    return DTYPE_NAMES[name]


def _eos(folder: Path, fields: _Fields) -> tuple[int, ...]:
    """The tokens that end a text: those that generation uses first, then config.json's."""
    path = folder / "generation_config.json"
    generation = _Fields(path, read_json(path)).tokens("eos_token_id") if path.exists() else ()
    return tuple(dict.fromkeys(generation + fields.tokens("eos_token_id")))
