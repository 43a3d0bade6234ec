"""The C interface itself, through ctypes: what it refuses and in which words, the scales, the layout of weights, several models and threads."""

from __future__ import annotations

import ctypes
import json
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from runtime import infinicore
from runtime.engine import Engine, load_library
from runtime.manifest import read_build
from runtime.structs import Qwen3MetaCStruct, Qwen3WeightsCStruct
from tests.codegen.engines import Builder, config_of, meta_of, open_engine
from tests.models import random_weights, relative_l2

BAD_PARAM, NULL_POINTER, NO_DEVICE = 3, 4, 5
U32, F32 = ctypes.c_uint32, ctypes.c_float
EXACT = 1e-5  # float32 sums in two orders; see test_engine.py


class HostWeights:
    """Qwen3Weights over arrays of this process, from a checkpoint's tensors: nothing of the runtime's own packing."""

    def __init__(self, config: dict[str, Any], tensors: dict[str, np.ndarray], transposed: bool = False) -> None:
        self.arrays: list[np.ndarray] = []
        layers = config["num_hidden_layers"]
        self.struct = Qwen3WeightsCStruct(
            nlayer=layers, dt_norm=13, dt_mat=13, transpose_linear_weights=int(transposed)
        )
        self.struct.input_embd = self._keep(tensors["model.embed_tokens.weight"])
        self.struct.output_norm = self._keep(tensors["model.norm.weight"])
        tied = "lm_head.weight" not in tensors
        self.struct.output_embd = self.struct.input_embd if tied else self._keep(tensors["lm_head.weight"])

        def layer(i: int, *names: str) -> np.ndarray:
            return np.concatenate([tensors[f"model.layers.{i}.{name}.weight"] for name in names])

        fields = {
            "attn_norm": ("input_layernorm",),
            "attn_qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            "attn_q_norm": ("self_attn.q_norm",),
            "attn_k_norm": ("self_attn.k_norm",),
            "attn_o": ("self_attn.o_proj",),
            "ffn_norm": ("post_attention_layernorm",),
            "ffn_gate_up": ("mlp.gate_proj", "mlp.up_proj"),
            "ffn_down": ("mlp.down_proj",),
        }
        for field, names in fields.items():
            values = [layer(i, *names) for i in range(layers)]
            if transposed and values[0].ndim == 2:
                values = [v.T for v in values]
            pointers = (ctypes.c_void_p * layers)(*[self._keep(v) for v in values])
            setattr(self.struct, field, pointers)

    def _keep(self, array: np.ndarray) -> int:
        self.arrays.append(np.ascontiguousarray(array, np.float32))
        return self.arrays[-1].ctypes.data


class Model:
    """A model made straight through the library, with caches, and calls that return (status, text)."""

    def __init__(self, library: ctypes.CDLL, meta: Qwen3MetaCStruct, weights: HostWeights) -> None:
        self.library, self.meta, self.weights = library, meta, weights
        self.handle = library.createQwen3Model(ctypes.byref(meta), ctypes.byref(weights.struct), 0, 1, None)
        assert self.handle, library.qwen3LastError()

    def error(self) -> str:
        return self.library.qwen3LastError().decode()

    def cache(self) -> int:
        return self.library.createKVCache(self.handle, 0)

    def forward(
        self, tokens=(1,), lens=(1,), pos=(0,), caches=(), rows=None, nrows=None, ntok=None, logits: Any = True
    ) -> tuple[int, str]:
        count = nrows if nrows is not None else len(lens)
        out = np.zeros((max(count, 1), self.meta.dvoc), np.float32)
        status = self.library.forwardBatch(
            self.handle,
            (U32 * len(tokens))(*tokens),
            len(tokens) if ntok is None else ntok,
            (U32 * len(lens))(*lens),
            len(lens),
            (U32 * len(pos))(*pos),
            (ctypes.c_void_p * len(caches))(*caches),
            None if rows is None else (U32 * len(rows))(*rows),
            count,
            out.ctypes.data_as(ctypes.POINTER(F32)) if logits else None,
        )
        return status, self.error()

    def infer(self, cache: int, temperature=1.0, topk=1, topp=1.0, random=0.5) -> tuple[int, str]:
        one = U32 * 1
        status = self.library.inferBatch(
            self.handle, one(1), 1, one(1), 1, one(0), (ctypes.c_void_p * 1)(cache),
            (F32 * 1)(temperature), one(topk), (F32 * 1)(topp), (F32 * 1)(random), one(0),
        )  # fmt: skip
        return status, self.error()

    def close(self) -> None:
        self.library.destroyQwen3Model(self.handle)
        self.handle = None


@pytest.fixture(scope="module")
def config() -> dict[str, Any]:
    return config_of("three")


@pytest.fixture(scope="module")
def library(build_engine: Builder) -> ctypes.CDLL:
    build = read_build(build_engine("three", kv="paged", dtype="f32"))
    infinicore.load(build.data)
    return load_library(build.library)


@pytest.fixture
def meta(build_engine: Builder) -> Qwen3MetaCStruct:
    return meta_of(build_engine("three", kv="paged", dtype="f32"))


@pytest.fixture
def weights(config: dict[str, Any]) -> HostWeights:
    return HostWeights(config, random_weights(config, 0))


@pytest.fixture
def model(library: ctypes.CDLL, meta: Qwen3MetaCStruct, weights: HostWeights) -> Iterator[Model]:
    made = Model(library, meta, weights)
    yield made
    if made.handle:
        made.close()


def one_line(text: str, *parts: str) -> None:
    assert text and "\n" not in text
    for part in parts:
        assert part in text, text


# --- making a model -------------------------------------------------------------------------------------------------------------------------------


def refuse(library, meta, weights, device=0, ndev=1) -> str:
    made = library.createQwen3Model(
        meta and ctypes.byref(meta), weights and ctypes.byref(weights.struct), device, ndev, None
    )
    assert not made
    return library.qwen3LastError().decode()


@pytest.mark.parametrize("field", ["dt_logits", "nlayer", "d", "nh", "nkvh", "dh", "di", "dvoc"])
def test_another_size_is_refused_by_name(library, meta, weights, field):
    right = getattr(meta, field)
    setattr(meta, field, right + 1)
    one_line(
        refuse(library, meta, weights), f"meta.{field} is {right + 1}, this engine was compiled for {right}", "status 3"
    )


@pytest.mark.parametrize("field, value", [("epsilon", 1e-3), ("theta", 5.0), ("epsilon", float("nan"))])
def test_other_constants_are_refused(library, meta, weights, field, value):
    setattr(meta, field, value)
    one_line(refuse(library, meta, weights), f"meta.{field}")


def test_the_context_may_be_smaller_but_not_larger(library, meta, weights):
    compiled = meta.dctx
    for wrong in (0, compiled + 1):
        meta.dctx = wrong
        one_line(refuse(library, meta, weights), f"meta.dctx is {wrong}", f"at most {compiled}")
    meta.dctx = 10
    model = Model(library, meta, weights)
    cache = model.cache()
    assert model.forward(range(10), [10], [0], [cache])[0] == 0
    one_line(model.forward([1], [1], [10], [cache])[1], "ends at position 11, the context is 10")
    model.close()


@pytest.mark.parametrize("field", ["scale_input", "scale_output", "scale_o", "scale_down"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_scales_must_be_finite(library, meta, weights, field, value):
    setattr(meta, field, value)
    one_line(refuse(library, meta, weights), "scale", "not finite")


@pytest.mark.parametrize("field", ["input_embd", "output_norm", "output_embd"])
def test_a_null_weight_is_refused_by_name(library, meta, weights, field):
    setattr(weights.struct, field, None)
    one_line(refuse(library, meta, weights), field, "null")


@pytest.mark.parametrize(
    "field", ["attn_norm", "attn_qkv", "attn_q_norm", "attn_k_norm", "attn_o", "ffn_norm", "ffn_gate_up", "ffn_down"]
)
def test_a_null_layer_is_refused_by_name(library, meta, weights, field):
    getattr(weights.struct, field)[2] = None
    one_line(refuse(library, meta, weights), f"weights.{field} is null for layer 2")
    setattr(weights.struct, field, None)
    one_line(refuse(library, meta, weights), f"weights.{field} is null for layer 0")


def test_other_weights_are_refused(library, meta, weights):
    weights.struct.nlayer = 2
    one_line(refuse(library, meta, weights), "weights.nlayer is 2, this engine was compiled for 3")
    weights.struct.nlayer, weights.struct.dt_mat = 3, 19
    one_line(refuse(library, meta, weights), "dt_mat", "13")
    weights.struct.dt_mat, weights.struct.attn_qkv_b = 13, weights.struct.attn_norm
    one_line(refuse(library, meta, weights), "attn_qkv_b", "no bias")


def test_null_pointers_devices_and_counts(library, meta, weights):
    one_line(refuse(library, None, weights), "meta or weights is null", f"status {NULL_POINTER}")
    one_line(refuse(library, meta, None), "meta or weights is null")
    one_line(
        refuse(library, meta, weights, device=1), "device 1, this engine was compiled for 0", f"status {NO_DEVICE}"
    )
    for ndev in (2, 0, -1):
        one_line(refuse(library, meta, weights, ndev=ndev), f"ndev is {ndev}")
    library.destroyQwen3Model(None)
    assert library.lengthKVCache(None) == 0


def test_a_failed_text_is_gone_after_a_call_that_works(model):
    assert model.forward(caches=[0])[0] == BAD_PARAM and model.error()
    cache = model.cache()
    assert model.error() == ""
    assert model.forward(caches=[cache]) == (0, "")


def test_the_text_belongs_to_the_thread(model):
    assert model.forward(caches=[0])[0] == BAD_PARAM
    texts = []
    thread = threading.Thread(target=lambda: texts.append(model.error()))
    thread.start()
    thread.join()
    assert texts == [""] and "not one of this model" in model.error()


# --- batches --------------------------------------------------------------------------------------------------------------------------------------


def test_bad_batches_are_refused_and_change_nothing(model):
    a, b = model.cache(), model.cache()
    assert model.forward([1, 2, 3], [3], [0], [a])[0] == 0
    vocabulary, context = model.meta.dvoc, model.meta.dctx
    refused = [
        (
            dict(tokens=[1, vocabulary], lens=[1, 1], pos=[3, 0], caches=[a, b]),
            f"token 1 is {vocabulary}, the vocabulary has {vocabulary}",
        ),
        (dict(tokens=[2**32 - 1], caches=[a]), "token 0 is 4294967295"),
        (dict(pos=[4], caches=[a]), "request 0 starts at position 4, its KV cache holds 3 tokens"),
        (dict(tokens=[1, 1], lens=[1, 1], pos=[3, 3], caches=[a, a]), "request 1 has the KV cache of request 0"),
        (
            dict(tokens=[1] * context, lens=[context], pos=[3], caches=[a]),
            f"request 0 ends at position {context + 3}, the context is {context}",
        ),
        (dict(lens=[2**32 - 1], pos=[3], caches=[a]), "request 0 ends at position 4294967298"),
        (dict(tokens=[1], lens=[1, 0], pos=[3, 0], caches=[a, b]), "request 1 has no tokens"),
        (dict(tokens=[1, 2], caches=[a]), "ntok is 2, req_lens add up to 1"),
        (dict(lens=[], pos=[], caches=[], nrows=0), "no requests"),
        (dict(caches=[0]), "its KV cache is not one of this model"),
        (dict(caches=[a], rows=[1], nrows=1), "row 0 is token 1 of 1"),
        (dict(caches=[a], rows=[], nrows=0), "no rows"),
        (dict(caches=[a], nrows=2), "nrows is 2 for 1 requests"),
    ]
    for arguments, text in refused:
        status, found = model.forward(**arguments)
        assert status == BAD_PARAM, text
        one_line(found, text, "status 3")
        assert (model.library.lengthKVCache(a), model.library.lengthKVCache(b)) == (3, 0)
    status, text = model.forward(caches=[a], logits=None)
    assert status == NULL_POINTER
    one_line(text, "logits is null")
    assert (
        model.library.forwardBatch(model.handle, None, 1, None, 1, None, None, None, 1, (F32 * vocabulary)())
        == NULL_POINTER
    )
    assert model.library.forwardBatch(None, None, 1, None, 1, None, None, None, 1, (F32 * vocabulary)()) == NULL_POINTER
    one_line(model.error(), "model is null")


@pytest.mark.parametrize(
    "arguments",
    [
        dict(topk=0),
        dict(temperature=-1.0),
        dict(temperature=float("nan")),
        dict(temperature=float("inf")),
        dict(topp=-0.1),
        dict(topp=1.5),
        dict(topp=float("nan")),
    ]
    + [dict(random=1.0), dict(random=-0.5), dict(random=float("nan"))],
    ids=str,
)
def test_bad_sampling_settings_are_refused(model, arguments):
    cache = model.cache()
    status, text = model.infer(cache, **arguments)
    assert status == BAD_PARAM
    one_line(text, "request 0", "temperature")
    assert model.library.lengthKVCache(cache) == 0
    assert model.infer(cache)[0] == 0


def test_caches_of_another_model_are_strangers(library, meta, weights, model):
    other = Model(library, meta, weights)
    theirs, mine = other.cache(), model.cache()
    assert model.forward(caches=[theirs])[0] == BAD_PARAM
    for call in ("trimKVCache", "reserveKVCache"):
        assert getattr(library, call)(model.handle, theirs, 0) == BAD_PARAM
        one_line(model.error(), "not one of this model")
    assert library.dropKVCache(model.handle, theirs) == BAD_PARAM
    assert not library.duplicateKVCache(model.handle, theirs, 0)
    assert library.dropKVCache(model.handle, mine) == 0
    assert library.dropKVCache(model.handle, mine) == BAD_PARAM  # a second time
    assert other.forward(caches=[theirs])[0] == 0
    other.close()


def test_duplicates_and_the_pool_are_checked(model):
    cache = model.cache()
    model.forward([1, 2], [2], [0], [cache])
    assert not model.library.duplicateKVCache(model.handle, cache, 3)
    one_line(model.error(), "seq_len is 3, the cache holds 2")
    assert model.library.setKVPoolSize(model.handle, 100) == BAD_PARAM
    one_line(model.error(), "in use already")
    assert model.library.getKVPoolInfo(model.handle, None) == NULL_POINTER
    assert model.library.getQwen3Counter(model.handle, b"no such counter") == 0
    host = (ctypes.c_char * 8)()
    assert model.library.exportKVCache(model.handle, cache, 1, 2, host) == BAD_PARAM
    one_line(model.error(), "1 + 2 of 2")
    assert model.library.exportKVCache(model.handle, cache, 0, 1, None) == BAD_PARAM
    assert model.library.importKVCache(model.handle, cache, 3, 1, host) == BAD_PARAM


def test_destroying_a_model_takes_its_caches_along(library, meta, weights):
    model = Model(library, meta, weights)
    caches = [model.cache() for _ in range(3)]
    assert model.forward([1, 2, 3], [1, 1, 1], [0, 0, 0], caches)[0] == 0
    model.library.duplicateKVCache(model.handle, caches[0], 1)
    model.close()  # the sanitizers' suite watches the same for leaks


# --- scales and layouts ---------------------------------------------------------------------------------------------------------------------------


def scaled(tensors: dict[str, np.ndarray], part: str, factor: float) -> dict[str, np.ndarray]:
    return {name: (a * np.float32(factor) if part in name else a) for name, a in tensors.items()}


def logits_of(library: ctypes.CDLL, meta: Qwen3MetaCStruct, weights: HostWeights, tokens: np.ndarray) -> np.ndarray:
    with Engine(library, meta, weights.struct, 0, [0]) as engine:
        return engine.forward(tokens, [len(tokens)], [0], [engine.create_cache(0)], range(len(tokens)))


# A field of Meta, and the weights that hold the same factor in a checkpoint.
SCALES = {"scale_o": "o_proj", "scale_down": "down_proj", "scale_input": "embed_tokens", "scale_output": "lm_head"}


@pytest.mark.parametrize("factor", [0.5, 1.7])
@pytest.mark.parametrize("field", SCALES)
def test_scales_equal_scaled_weights_in_onnxruntime(build_engine: Builder, tmp_path, field, factor):
    name = "wide"  # its head is not tied, so each scale has weights of its own
    config = config_of(name)
    tensors = random_weights(config, 0)
    build = build_engine(name, kv="paged", dtype="f32")
    meta = meta_of(build)
    setattr(meta, field, factor)
    library = load_library(read_build(build).library)
    tokens = np.random.default_rng(1).integers(0, config["vocab_size"], 21)
    found = logits_of(library, meta, HostWeights(config, tensors), tokens)
    expected = reference_logits_of(build_engine, config, scaled(tensors, SCALES[field], factor), tokens, tmp_path)
    assert relative_l2(found, expected) <= EXACT


@pytest.mark.parametrize("field", ["scale_input", "scale_output"])
def test_scales_of_a_tied_embedding_stay_apart(build_engine: Builder, library, config, meta, tmp_path, field):
    """One table, used twice: scaling one use must leave the other alone. An untied checkpoint with the same table says what is right."""
    tensors = random_weights(config, 0)
    setattr(meta, field, 1.7)
    tokens = np.random.default_rng(2).integers(0, config["vocab_size"], 21)
    found = logits_of(library, meta, HostWeights(config, tensors), tokens)
    untied = {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"]}
    untied = scaled(untied, SCALES[field], 1.7)
    expected = reference_logits_of(build_engine, {**config, "tie_word_embeddings": False}, untied, tokens, tmp_path)
    assert relative_l2(found, expected) <= EXACT


def test_all_scales_together(build_engine: Builder, library, config, meta, tmp_path):
    tensors = random_weights(config, 0)
    meta.scale_input, meta.scale_output, meta.scale_o, meta.scale_down = 0.9, 1.3, 0.7, 1.1
    tokens = np.random.default_rng(3).integers(0, config["vocab_size"], 21)
    found = logits_of(library, meta, HostWeights(config, tensors), tokens)
    other = {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"]}
    for field, part in SCALES.items():
        other = scaled(other, part, getattr(meta, field))
    expected = reference_logits_of(build_engine, {**config, "tie_word_embeddings": False}, other, tokens, tmp_path)
    assert relative_l2(found, expected) <= EXACT


def reference_logits_of(
    build_engine: Builder, config: dict[str, Any], tensors: dict[str, np.ndarray], tokens: np.ndarray, folder
) -> np.ndarray:
    """onnxruntime on a checkpoint of exactly these tensors."""
    model = folder / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps({**config, "torch_dtype": "float32"}))
    save_file(tensors, str(model / "model.safetensors"))
    return build_engine.reference(model, folder / "model.onnx").logits(tokens)[0]


@pytest.mark.parametrize("options", [dict(kv="paged"), dict(infinicore="any")], ids=str)
def test_transposed_weights_give_the_same(build_engine: Builder, options):
    name = "three" if "kv" in options else "two"
    config = config_of(name)
    tensors = random_weights(config, 0)
    build = build_engine(name, dtype="f32", **options)
    infinicore.load(read_build(build).data)
    library, meta = load_library(read_build(build).library), meta_of(build)
    tokens = np.random.default_rng(4).integers(0, config["vocab_size"], 33)
    straight = logits_of(library, meta, HostWeights(config, tensors), tokens)
    turned = logits_of(library, meta, HostWeights(config, tensors, transposed=True), tokens)
    assert relative_l2(turned, straight) <= EXACT


# --- several models, several threads --------------------------------------------------------------------------------------------------------------


def in_threads(*functions: Callable[[], None]) -> None:
    errors: list[BaseException] = []

    def guarded(function: Callable[[], None]) -> None:
        try:
            function()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(f,)) for f in functions]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    if errors:
        raise errors[0]


def decode(engine: Engine, library: Any, tokens: np.ndarray, results: list, repeats: int) -> None:
    """Feed a sequence token by token through the library itself: Engine has a lock of its own, which must not be what makes this work."""
    for _ in range(repeats):
        cache = library.createKVCache(engine._model, 0)
        rows = []
        for i, token in enumerate(tokens):
            out = np.empty((1, engine.meta.dvoc), np.float32)
            one = U32 * 1
            status = library.forwardBatch(
                engine._model,
                one(int(token)),
                1,
                one(1),
                1,
                one(i),
                (ctypes.c_void_p * 1)(cache),
                None,
                1,
                out.ctypes.data_as(ctypes.POINTER(F32)),
            )
            assert status == 0, library.qwen3LastError()
            rows.append(out[0])
        assert library.dropKVCache(engine._model, cache) == 0
        results.append(np.stack(rows))


def test_threads_on_one_model_take_turns(build_engine: Builder):
    build = build_engine("three", kv="paged", dtype="f32")
    reference = build_engine.reference(build_engine.checkpoint("three"))
    with open_engine(build) as engine:
        prompts = [np.random.default_rng(i).integers(0, engine.meta.dvoc, 20) for i in range(3)]
        results: list[list[np.ndarray]] = [[] for _ in prompts]
        library = engine._library
        in_threads(*(lambda p=p, r=r: decode(engine, library, p, r, 4) for p, r in zip(prompts, results)))
        assert engine.pool_info()["free_blocks"] == engine.pool_info()["total_blocks"]
    for prompt, rows in zip(prompts, results):
        expected = reference.logits(prompt)[0]
        assert len(rows) == 4 and all(relative_l2(found, expected) <= EXACT for found in rows)


def test_two_models_in_two_threads(build_engine: Builder):
    subjects = [("three", dict(kv="paged")), ("two", dict(infinicore="any"))]
    engines = [open_engine(build_engine(name, dtype="f32", **options)) for name, options in subjects]
    prompts = [np.random.default_rng(i).integers(0, e.meta.dvoc, 20) for i, e in enumerate(engines)]
    results: list[list[np.ndarray]] = [[] for _ in engines]
    in_threads(*(lambda e=e, p=p, r=r: decode(e, e._library, p, r, 4) for e, p, r in zip(engines, prompts, results)))
    for (name, _), engine, prompt, rows in zip(subjects, engines, prompts, results):
        expected = build_engine.reference(build_engine.checkpoint(name)).logits(prompt)[0]
        assert all(relative_l2(found, expected) <= EXACT for found in rows)
        engine.close()
