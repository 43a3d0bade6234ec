"""What createQwen3Model takes: the model's sizes (Qwen3Meta) and host pointers to its weights (Qwen3Weights)."""

from __future__ import annotations

import ctypes
import json
import math
import os
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from runtime import recipes
from runtime.errors import CheckpointError, ConfigError
from runtime.manifest import Build, check_fingerprint
from runtime.packs import Pack
from runtime.recipes import Leaf, Node
from runtime.structs import (
    COMPUTE_DTYPES,
    NUMPY_DTYPES,
    Qwen3MetaCStruct,
    Qwen3WeightsCStruct,
    dtype_name,
    field_names,
)

SINGLE_WEIGHTS = ("input_embd", "output_norm", "output_embd")
LAYER_WEIGHTS = (
    "attn_norm",
    "attn_qkv",
    "attn_qkv_b",
    "attn_q_norm",
    "attn_k_norm",
    "attn_o",
    "ffn_norm",
    "ffn_gate_up",
    "ffn_down",
)
# These are cut into one piece per device; embedding, norms and lm_head are on every device.
_SHARDED = ("attn_qkv", "attn_qkv_b", "attn_o", "ffn_gate_up", "ffn_down")
_MATRICES = ("attn_qkv", "attn_o", "ffn_gate_up", "ffn_down")
_PROGRESS_FROM_BYTES = 256 << 20


class Qwen3WeightsNaming:
    """The names of a Qwen3 checkpoint's tensors."""

    def input_embd(self) -> str:
        return "model.embed_tokens.weight"

    def output_norm(self) -> str:
        return "model.norm.weight"

    def output_embd(self) -> str:
        return "lm_head.weight"

    def attn_norm(self, i: int) -> str:
        return f"model.layers.{i}.input_layernorm.weight"

    def attn_q(self, i: int) -> str:
        return f"model.layers.{i}.self_attn.q_proj.weight"

    def attn_k(self, i: int) -> str:
        return f"model.layers.{i}.self_attn.k_proj.weight"

    def attn_v(self, i: int) -> str:
        return f"model.layers.{i}.self_attn.v_proj.weight"

    def attn_o(self, i: int) -> str:
        return f"model.layers.{i}.self_attn.o_proj.weight"

    def attn_q_b(self, i: int) -> str:
        return f"model.layers.{i}.self_attn.q_proj.bias"

    def attn_k_b(self, i: int) -> str:
        return f"model.layers.{i}.self_attn.k_proj.bias"

    def attn_v_b(self, i: int) -> str:
        return f"model.layers.{i}.self_attn.v_proj.bias"

    def attn_q_norm(self, i: int) -> str:
        return f"model.layers.{i}.self_attn.q_norm.weight"

    def attn_k_norm(self, i: int) -> str:
        return f"model.layers.{i}.self_attn.k_norm.weight"

    def ffn_norm(self, i: int) -> str:
        return f"model.layers.{i}.post_attention_layernorm.weight"

    def gate(self, i: int) -> str:
        return f"model.layers.{i}.mlp.gate_proj.weight"

    def up(self, i: int) -> str:
        return f"model.layers.{i}.mlp.up_proj.weight"

    def down(self, i: int) -> str:
        return f"model.layers.{i}.mlp.down_proj.weight"

    @classmethod
    def match(cls, state_dict: Mapping[str, Any]) -> bool:
        """Whether a state dict uses these names."""
        names = cls()
        return all(name in state_dict for name in (names.output_norm(), names.attn_q(0), names.attn_q_norm(0)))


class Qwen3MetaFromConfig(Qwen3MetaCStruct):
    """Qwen3Meta from a Hugging Face configuration.

    Args:
        config: config.json as a dict, as an object with attributes (transformers' config), or as a path to the file or
            its folder.
        dtype: compute dtype, as a name or a numpy or torch dtype; default: the configuration's own.
        max_tokens: context length in tokens; default, and at most, max_position_embeddings.

    Raises:
        ConfigError: a field is missing or out of range; nothing is guessed.
    """

    def __init__(self, config: Any, dtype: Any = None, max_tokens: int | None = None) -> None:
        fields, where = _config_fields(config)

        def number(name: str, kind: type, default: Any = None) -> Any:
            value = fields.get(name, default)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or value <= 0 or kind(value) != value:
                raise ConfigError(f"{where}: {name} is {value!r}, expected a positive {kind.__name__}")
            return kind(value)

        heads, hidden = number("num_attention_heads", int), number("hidden_size", int)
        context = number("max_position_embeddings", int)
        if max_tokens is not None and (not isinstance(max_tokens, int) or not 1 <= max_tokens <= context):
            raise ConfigError(f"max_tokens is {max_tokens!r}, expected 1 to max_position_embeddings = {context}")
        if fields.get("rope_theta") is None:
            fields["rope_theta"] = (fields.get("rope_parameters") or {}).get("rope_theta")
        name = dtype_name(dtype if dtype is not None else fields.get("dtype") or fields.get("torch_dtype"))
        end = fields.get("eos_token_id")
        end = end[0] if isinstance(end, (list, tuple)) and end else end
        super().__init__(
            dt_logits=COMPUTE_DTYPES[name],
            nlayer=number("num_hidden_layers", int),
            d=hidden,
            nh=heads,
            nkvh=number("num_key_value_heads", int, heads),
            dh=number("head_dim", int, hidden // heads),
            di=number("intermediate_size", int),
            dctx=context if max_tokens is None else max_tokens,
            dvoc=number("vocab_size", int),
            epsilon=number("rms_norm_eps", float),
            theta=number("rope_theta", float),
            end_token=end if isinstance(end, int) else 0,
            scale_input=1.0,
            scale_output=1.0,
            scale_o=1.0,
            scale_down=1.0,
        )


def _config_fields(config: Any) -> tuple[dict[str, Any], str]:
    if isinstance(config, Mapping):
        return dict(config), "config"
    if not isinstance(config, (str, os.PathLike)):
        return dict(config.to_dict() if hasattr(config, "to_dict") else vars(config)), "config"
    path = Path(config)
    path = path / "config.json" if path.is_dir() else path
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: not a readable config.json ({error})") from None
    if not isinstance(fields, dict):
        raise ConfigError(f"{path}: holds a {type(fields).__name__}, expected a JSON object")
    return fields, str(path)


def meta_from_manifest(build: Build, max_tokens: int | None = None) -> Qwen3MetaCStruct:
    """The sizes that a build was compiled for; ``max_tokens`` may lower the context."""
    values = build.data["meta"]
    meta = Qwen3MetaCStruct(**{name: values[name] for name in field_names(Qwen3MetaCStruct)})
    if max_tokens is not None:
        if not isinstance(max_tokens, int) or not 1 <= max_tokens <= meta.dctx:
            raise ConfigError(f"max_tokens is {max_tokens!r}, expected 1 to {meta.dctx}, the build's context")
        meta.dctx = max_tokens
    return meta


class Qwen3WeightsImpl(Qwen3WeightsCStruct):
    """Qwen3Weights with the memory that its pointers point to; keep it alive as long as the engine uses it.

    Args:
        meta: sizes that the tensors must have.
        naming: names, a Qwen3WeightsNaming.
        state_dict: name -> numpy or torch tensor; linear weights are [out, in].
        ndev: devices; linear weights become [ndev, ...] concatenated shards.
        transpose_weight: store linear weights as [in, out].
        dt_mat, dt_norm: stored dtypes of matrices and norms; default: meta's.
        check: warn, in one line on stderr, about weights that are NaN or infinite.

    Raises:
        CheckpointError: a tensor is missing or has the wrong shape. ConfigError: ndev does not divide the heads.
    """

    def __init__(
        self,
        meta: Qwen3MetaCStruct,
        naming: Qwen3WeightsNaming,
        state_dict: Mapping[str, Any],
        ndev: int = 1,
        transpose_weight: bool = False,
        dt_mat: Any = None,
        dt_norm: Any = None,
        check: bool = True,
    ) -> None:
        compute = next(name for name, number in COMPUTE_DTYPES.items() if number == meta.dt_logits)
        mat = dtype_name(dt_mat) if dt_mat is not None else compute
        norm = dtype_name(dt_norm) if dt_norm is not None else compute
        nodes = _nodes_from_state_dict(meta, naming, state_dict, mat, norm, transpose_weight)
        self._build(meta, nodes, COMPUTE_DTYPES[norm], COMPUTE_DTYPES[mat], transpose_weight, ndev, check)

    @classmethod
    def from_manifest(
        cls, build: Build, folder: Path | None = None, ndev: int = 1, check: bool = True
    ) -> Qwen3WeightsImpl:
        """Map, and where needed pack, the weights of a build; ``folder`` overrides where its files lie."""
        data = build.data
        folder = folder or build.checkpoint_folder
        files = recipes.Files(folder, build.folder)
        spec, memo = data["weights"], {}

        def node(recipe: Any) -> Node | None:
            if recipe is None:
                return None
            key = json.dumps(recipe, sort_keys=True)  # equal recipes (tied embeddings) become one weight
            if key not in memo:
                memo[key] = recipes.parse(recipe, files)
            return memo[key]

        nodes: dict[str, Any] = {name: node(spec[name]) for name in SINGLE_WEIGHTS}
        for name in LAYER_WEIGHTS:
            nodes[name] = [node(recipe) for recipe in spec[name]] if spec.get(name) is not None else None
        check_fingerprint(build, folder)  # last: a missing or short file has a better message of its own
        self = cls.__new__(cls)
        transposed = bool(spec["transpose_linear_weights"])
        sizes = (spec["dt_norm"], spec["dt_mat"], transposed, ndev)
        self._build(meta_from_manifest(build), nodes, *sizes, check, identity=[spec, ndev])
        return self

    def _build(
        self,
        meta: Qwen3MetaCStruct,
        nodes: dict[str, Any],
        dt_norm: int,
        dt_mat: int,
        transposed: bool,
        ndev: int,
        check: bool,
        identity: Any = None,
    ) -> None:
        if ndev > 1:
            _shard_all(nodes, meta, ndev, transposed)
        unique: dict[int, Node] = {}
        for name in (*SINGLE_WEIGHTS, *LAYER_WEIGHTS):
            for node in nodes[name] if isinstance(nodes[name], list) else [nodes[name]]:
                if node is not None:
                    unique[id(node)] = node
        self._memory = _materialise(list(unique.values()), check, identity)
        arrays = dict(zip(unique, self._memory))
        pointers: dict[str, Any] = {name: arrays[id(nodes[name])].ctypes.data for name in SINGLE_WEIGHTS}
        for name in LAYER_WEIGHTS:
            if nodes[name] is not None:
                addresses = [arrays[id(node)].ctypes.data for node in nodes[name]]
                pointers[name] = (ctypes.c_void_p * len(addresses))(*addresses)
        self.nbytes = sum(array.nbytes for array in self._memory)
        tables = [node for name in SINGLE_WEIGHTS[:1] if (node := nodes[name]) is not nodes["output_embd"]]
        # What one decoded token has to read: everything but a separate input table, of which it takes one row.
        self.nbytes_per_token = self.nbytes - sum(arrays[id(node)].nbytes for node in tables)
        super().__init__(
            nlayer=meta.nlayer,
            dt_norm=int(dt_norm),
            dt_mat=int(dt_mat),
            transpose_linear_weights=int(transposed),
            **pointers,
        )


def _materialise(nodes: list[Node], check: bool, identity: Any) -> list[np.ndarray]:
    """Each node as an array, in parallel; warns about NaN and infinity and shows progress on a terminal.

    With an ``identity`` (see runtime.packs), what has to be packed is kept for later loads, and so is what was found in the weights.
    """
    views = [recipes.view(node) for node in nodes]
    packed = [i for i, array in enumerate(views) if array is None]
    pack = None if identity is None else Pack(identity, [nodes[i] for i in packed], nodes)
    found = pack is not None and pack.worthwhile and pack.find()
    started = pack is not None and pack.worthwhile and not found and pack.start()
    if found or started:
        assert pack is not None
        memory = {i: pack.array(n) for n, i in enumerate(packed)}
    else:
        memory = {}
    remark = pack.remark if pack is not None and found else None
    wanted, check = check, check and remark is None
    total = sum(recipes.nbytes_of(node) for node in nodes)
    quiet = True if total < _PROGRESS_FROM_BYTES or (found and not check) else None  # None: quiet unless on a terminal
    suspects: list[str] = []
    with tqdm(total=total, unit="B", unit_scale=True, desc="loading weights", disable=quiet, leave=False) as bar:

        def make(i: int) -> np.ndarray:
            node, array = nodes[i], views[i]
            if array is None:
                array = memory[i] if found else recipes.pack(node, memory.get(i))
            if check and recipes.has_nonfinite(array, node.dtype):
                bad = [leaf.name for leaf in recipes.leaves(node) if recipes.has_nonfinite(leaf.array(), leaf.dtype)]
                # Finite in the file, not so after conversion: float16 ends at 65504.
                suspects.append(bad[0] if bad else f"{recipes.leaves(node)[0].name} (as {node.dtype})")
            bar.update(array.nbytes)
            return array

        try:
            with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
                arrays = list(pool.map(make, range(len(nodes))))
        except BaseException:
            if pack is not None:
                pack.abandon()
            raise
    if check:
        more = f", and {len(suspects) - 1} other weights" if len(suspects) > 1 else ""
        remark = f"warning: weight {min(suspects)}{more} has NaN or infinite values" if suspects else ""
    if started and pack is not None:
        pack.finish(remark)
    if remark and wanted:
        print(remark, file=sys.stderr)
    return arrays


# ------------------------------------------------------------------------------------------- several devices


def _shard_all(nodes: dict[str, Any], meta: Qwen3MetaCStruct, ndev: int, transposed: bool) -> None:
    for name, what in (("nh", "attention heads"), ("nkvh", "key/value heads"), ("di", "intermediate size")):
        if getattr(meta, name) % ndev:
            raise ConfigError(f"ndev is {ndev}, expected a divisor of the model's {getattr(meta, name)} {what}")
    q, kv, inner = meta.nh * meta.dh, meta.nkvh * meta.dh, meta.di
    # name -> (axis that is cut, lengths of the parts stacked on it): each device gets its share of every part.
    cuts = {
        "attn_qkv": (0, (q, kv, kv)),
        "attn_qkv_b": (0, (q, kv, kv)),
        "attn_o": (1, (q,)),
        "ffn_gate_up": (0, (inner, inner)),
        "ffn_down": (1, (inner,)),
    }
    for name in _SHARDED:
        if nodes[name] is not None:
            turned = transposed and name in _MATRICES
            nodes[name] = [_shard(node, *cuts[name], ndev, turned) for node in nodes[name]]


def _shard(node: Node, axis: int, parts: tuple[int, ...], ndev: int, turned: bool) -> Node:
    node = recipes.transpose(node, (1, 0)) if turned else node
    shards = []
    for device in range(ndev):
        pieces, at = [], 0
        for length in parts:
            share = length // ndev
            pieces.append(recipes.slice_of(node, axis, at + device * share, at + (device + 1) * share))
            at += length
        shard = recipes.concat(pieces, axis)
        shards.append(recipes.transpose(shard, (1, 0)) if turned else shard)
    return recipes.concat(shards, 0)


# ------------------------------------------------------------------------------------------- from a state dict


def as_numpy(tensor: Any) -> np.ndarray:
    """A numpy array of a numpy or torch tensor, sharing its memory where it lies on the host."""
    if not hasattr(tensor, "detach"):
        return np.asarray(tensor)
    tensor = tensor.detach().cpu().contiguous()
    if str(tensor.dtype) == "torch.bfloat16":  # numpy() refuses it: pass the bits
        int16 = sys.modules["torch"].int16
        return tensor.view(int16).numpy().view(NUMPY_DTYPES["bf16"])
    return tensor.numpy()


def _nodes_from_state_dict(
    meta: Qwen3MetaCStruct,
    naming: Qwen3WeightsNaming,
    state_dict: Mapping[str, Any],
    mat: str,
    norm: str,
    transpose_weight: bool,
) -> dict[str, Any]:
    names = {dtype: name for name, dtype in NUMPY_DTYPES.items()}

    def leaf(name: str, shape: tuple[int, ...], dtype: str) -> Node:
        if name not in state_dict:
            raise CheckpointError(f"state_dict: weight {name} is missing")
        array = as_numpy(state_dict[name])
        if array.shape != shape or array.dtype not in names:
            raise CheckpointError(
                f"state_dict: weight {name} is {array.dtype}{list(array.shape)}, expected {dtype}{list(shape)}"
            )
        return recipes.cast(Leaf(name, names[array.dtype], shape, memory=array), dtype)

    def matrix(parts: list[Node]) -> Node:
        node = recipes.concat(parts, 0)
        return recipes.transpose(node, (1, 0)) if transpose_weight else node

    def per_layer(make: Callable[[int], Node]) -> list[Node]:
        return [make(i) for i in range(meta.nlayer)]

    d, q, kv, inner = meta.d, meta.nh * meta.dh, meta.nkvh * meta.dh, meta.di
    embedding = leaf(naming.input_embd(), (meta.dvoc, d), mat)
    untied = naming.output_embd() in state_dict
    nodes: dict[str, Any] = {
        "input_embd": embedding,
        "output_norm": leaf(naming.output_norm(), (d,), norm),
        "output_embd": leaf(naming.output_embd(), (meta.dvoc, d), mat) if untied else embedding,
        "attn_norm": per_layer(lambda i: leaf(naming.attn_norm(i), (d,), norm)),
        "attn_qkv": per_layer(
            lambda i: matrix(
                [
                    leaf(naming.attn_q(i), (q, d), mat),
                    leaf(naming.attn_k(i), (kv, d), mat),
                    leaf(naming.attn_v(i), (kv, d), mat),
                ]
            )
        ),
        "attn_qkv_b": None,
        "attn_q_norm": None,
        "attn_k_norm": None,
        "attn_o": per_layer(lambda i: matrix([leaf(naming.attn_o(i), (d, q), mat)])),
        "ffn_norm": per_layer(lambda i: leaf(naming.ffn_norm(i), (d,), norm)),
        "ffn_gate_up": per_layer(
            lambda i: matrix([leaf(naming.gate(i), (inner, d), mat), leaf(naming.up(i), (inner, d), mat)])
        ),
        "ffn_down": per_layer(lambda i: matrix([leaf(naming.down(i), (d, inner), mat)])),
    }
    if naming.attn_q_b(0) in state_dict:
        biases = ((naming.attn_q_b, q), (naming.attn_k_b, kv), (naming.attn_v_b, kv))
        nodes["attn_qkv_b"] = per_layer(lambda i: recipes.concat([leaf(b(i), (n,), mat) for b, n in biases], 0))
    if naming.attn_q_norm(0) in state_dict:
        nodes["attn_q_norm"] = per_layer(lambda i: leaf(naming.attn_q_norm(i), (meta.dh,), norm))
        nodes["attn_k_norm"] = per_layer(lambda i: leaf(naming.attn_k_norm(i), (meta.dh,), norm))
    return nodes


def kv_bytes_per_token(meta: Qwen3MetaCStruct, dtype: str) -> int:
    """K and V of one token in all layers, in bytes."""
    return 2 * meta.nlayer * meta.nkvh * meta.dh * NUMPY_DTYPES[dtype].itemsize


def matrix_flops_per_token(meta: Qwen3MetaCStruct) -> int:
    """Multiplications and additions of the layers' matrices for one token; attention and lm_head not counted."""
    q, kv = meta.nh * meta.dh, meta.nkvh * meta.dh
    return 2 * meta.nlayer * math.prod((meta.d, 2 * q + 2 * kv + 3 * meta.di))
