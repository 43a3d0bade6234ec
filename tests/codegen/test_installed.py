"""Which operators an installation has and how they take their arguments: small header sets of each era, stub libraries, and what is really installed."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from codegen import calls
from codegen.calls import CALLS, OLDER, PARAMETERS, RECORD_OPS, CallSpec
from codegen.declarations import read_header
from codegen.elf import exported_symbols
from codegen.installed import CORE, Installed, narrow, probe
from ir.errors import BuildError
from passes.targets import targets
from runtime import canaries
from tests.runtime import fakes

ERAS = Path(__file__).parent / "headers"
REAL = os.environ.get("QWEN3_TEST_INFINI_ROOT", "")


def symbols_of(*names: str) -> list[str]:
    """All that an operator may export."""
    return [s for name in names for s in calls.symbols(CallSpec(name, (), ()))]


@pytest.fixture
def install(tmp_path: Path) -> Callable[..., Path]:
    """``install(headers, symbols)``: an installation with these headers and libraries that export these symbols."""

    def make(headers: Path | dict[str, str] | None, symbols: Iterable[str], core: Iterable[str] = CORE) -> Path:
        root = tmp_path / "infini"
        shutil.rmtree(root, ignore_errors=True)
        (root / "lib").mkdir(parents=True)
        if isinstance(headers, Path):
            shutil.copytree(headers / "include", root / "include")
        for name, text in headers.items() if isinstance(headers, dict) else ():
            path = root / "include" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        for library, names in (("libinfinirt.so", core), ("libinfiniop.so", symbols)):
            source = root / f"{library}.cc"
            source.write_text('extern "C" {\n' + "".join(f"int {n}() {{ return 0; }}\n" for n in names) + "}\n")
            fakes.compile_library(source, root / "lib" / library)
        return root

    return make


def declared(folder: Path) -> list[str]:
    return [f.name for h in sorted(folder.rglob("*.h")) for f in read_header(h.read_text(), "infiniop")]


@pytest.fixture
def era(install: Callable[..., Path]) -> Callable[..., Installed]:
    """``era(name)``: the headers of that day, with a library that exports what they declare."""
    return lambda name, *more: probe(install(ERAS / name, [*declared(ERAS / name), *more]))


# --- the eras -------------------------------------------------------------------------------------------------------------------------------------


def test_autumn_2025_has_rope_without_a_choice_of_pairs(era: Callable[..., Installed]) -> None:
    found = era("2025-09-01")
    assert found.source == "headers" and found.ops == {"gemm"}
    assert found.specs["infini.rope"] == OLDER["infini.rope"][0] and "algo" not in found.specs["infini.rope"].create
    assert "interleaved pairs only" in found.notes["rope"]
    assert found.specs["infini.gemm"] == CALLS["infini.gemm"] and "gemm" not in found.notes
    # In place, as it was in early 2025: no form that is known.
    assert "(handle, desc_ptr, y_desc)" not in found.notes["causal_softmax"]
    assert "takes (y_desc); known are y, x" in found.notes["causal_softmax"]
    assert found.arguments["infiniopRoPE"][3:] == ("y", "x", "pos_ids", "sin_table", "cos_table", "stream")


def test_january_2026_has_the_older_caching_and_unusable_forms(era: Callable[..., Installed]) -> None:
    found = era("2026-01-05")
    assert found.ops == {"rope", "paged_caching"}
    assert found.specs["infini.rope"] == CALLS["infini.rope"]
    assert found.specs["infini.paged_caching"] == OLDER["infini.paged_caching"][0]
    assert found.specs["infini.paged_caching"].create == ("i2", "i3", "o0", "o1", "i4")
    assert found.notes["paged_caching"] == "the order before 2026-01-12"
    assert "one pointer more" in found.notes["paged_attention_prefill"]
    assert "does not give the sum" in found.notes["add_rms_norm"]
    assert found.notes["log_softmax"] == "the form before 2026-04-02"


def test_later_in_january_2026_only_add_rms_norm_is_older(era: Callable[..., Installed]) -> None:
    found = era("2026-01-20")
    assert found.ops == {"add_rms_norm", "paged_caching", "paged_attention", "paged_attention_prefill"}
    spec = found.specs["infini.add_rms_norm"]
    assert spec == OLDER["infini.add_rms_norm"][0]
    assert spec.create == ("o0", "i0", "i1", "i2", "epsilon", "o1") and spec.call == ("o0", "i0", "i1", "i2", "o1")
    assert found.notes["add_rms_norm"] == "the order before 2026-02-13"
    for op in ("infini.paged_caching", "paged_attention", "paged_attention_prefill"):
        assert found.specs[op] == CALLS[op]


def test_spring_2026_has_todays_orders(era: Callable[..., Installed]) -> None:
    found = era("2026-04-10")
    assert found.ops == {
        *("add_rms_norm", "embedding", "log_softmax", "paged_attention", "paged_attention_prefill", "paged_caching")
    }
    assert found.specs == CALLS and not found.ops & set(found.notes)
    # Embedding takes no workspace, and nobody asks for the size of one.
    assert "infiniopGetEmbeddingWorkspaceSize" not in found.arguments


def test_the_lengths_of_early_paged_attention_are_wide(era: Callable[..., Installed]) -> None:
    """They took int64 only until 2026-03-06, when the headers' macro got its present name."""
    record = targets()["nvidia"]
    assert "i32" in record.ops["paged_attention"].index_dtypes
    early = narrow(record, era("2026-01-20"))
    for op in ("paged_attention", "paged_attention_prefill"):
        assert early.ops[op].index_dtypes == ("i64",)
    assert narrow(record, era("2026-04-10")).ops["paged_attention"] == record.ops["paged_attention"]


@pytest.mark.parametrize("symbol", calls.symbols(CALLS["infini.add_rms_norm"]))
def test_an_op_counts_only_if_the_library_exports_it(symbol: str, install: Callable[..., Path]) -> None:
    folder = ERAS / "2026-01-20"
    found = probe(install(folder, [s for s in declared(folder) if s != symbol]))
    assert "add_rms_norm" not in found.ops and "paged_caching" in found.ops
    assert found.notes["add_rms_norm"] == f"its libraries have no {symbol}"


# --- parameter lists ------------------------------------------------------------------------------------------------------------------------------

ADD = """
{c} infiniStatus_t infiniopCreateAddDescriptor(infiniopHandle_t handle, infiniopAddDescriptor_t *desc_ptr, {create});
{c} infiniStatus_t infiniopGetAddWorkspaceSize(infiniopAddDescriptor_t desc, size_t *size);
{c} infiniStatus_t infiniopAdd(infiniopAddDescriptor_t desc, {call}, void *stream);
{c} infiniStatus_t infiniopDestroyAddDescriptor(infiniopAddDescriptor_t desc);
"""
T = "infiniopTensorDescriptor_t"
SIZED = "void *workspace, size_t workspace_size, "


@pytest.mark.parametrize(
    "create, call, note",
    [
        (f"{T} c, {T} a, {T} b", SIZED + "void *c, const void *a, const void *b", ""),
        # An order that never was is followed as well: names are what counts.
        (f"{T} a_desc, {T} b_desc, {T} c_desc", SIZED + "const void *a, const void *b, void *c", "an order of its own"),
        (f"{T} c, {T} a, {T} other", SIZED + "void *c, void *a, void *b", "takes (c, a, other); known are c, a, b"),
        (f"{T} c, {T} a", SIZED + "void *c, void *a, void *b", "takes (c, a); known are c, a, b"),
        (f"{T} c, {T} a, {T} a", SIZED + "void *c, void *a, void *b", "takes (c, a, a); known are"),
        (f"{T} c, {T} a, {T} b, int mode", SIZED + "void *c, void *a, void *b", "takes (c, a, b, mode); known are"),
        (f"{T}, {T}, {T}", SIZED + "void *c, void *a, void *b", f"takes ({T}, {T}, {T}); known are"),
        (f"{T} c, {T} a, float b", SIZED + "void *c, void *a, void *b", f"takes float b, expected {T}"),
        (f"{T} c, {T} a, {T} b", SIZED + "void *c, void *a, size_t b", "takes size_t b, expected a pointer"),
        # The form before April 2025: no workspace.
        (f"{T} c, {T} a, {T} b", "void *c, const void *a, const void *b", "an order of its own"),
    ],
)  # fmt: skip
def test_parameter_lists(create: str, call: str, note: str, install: Callable[..., Path]) -> None:
    header = ADD.format(c="__C", create=create, call=call)
    found = probe(install({"infiniop.h": header}, symbols_of("Add")))
    if note and not note.startswith("an order"):
        assert "add" not in found.ops and note in found.notes["add"]
        return
    assert found.ops == {"add"} and found.notes.get("add", "").startswith(note)
    spec, roles = found.specs["infini.add"], {"c": "o0", "a": "i0", "b": "i1"}
    assert spec.create == tuple(roles[n] for n in re.findall(r"\b([abc])(?:_desc)?\b(?=,|$)", create))
    assert spec.call == tuple(roles[n] for n in re.findall(r"\*([abc])\b", call))
    assert spec.workspace == call.startswith(SIZED)


def test_declarations_that_contradict_each_other(install: Callable[..., Path]) -> None:
    good = ADD.format(c="__C", create=f"{T} c, {T} a, {T} b", call=SIZED + "void *c, void *a, void *b")
    other = ADD.format(c="__C", create=f"{T} a, {T} b, {T} c", call=SIZED + "void *c, void *a, void *b")
    files = {"infiniop.h": '#include "infiniop/ops/add.h"\n' + good, "infiniop/ops/add.h": good}
    assert probe(install(files, symbols_of("Add"))).ops == {"add"}
    files["infiniop/ops/add.h"] = other
    assert "more than once, differently" in probe(install(files, symbols_of("Add"))).notes["add"]
    files["infiniop/ops/add.h"] = f"#if 0\n{other}#endif\n"
    assert probe(install(files, symbols_of("Add"))).ops == {"add"}


def test_a_header_that_nothing_includes_does_not_count(install: Callable[..., Path]) -> None:
    """The engine includes infiniop.h, which leaves some operators out."""
    good = ADD.format(c="__C", create=f"{T} c, {T} a, {T} b", call=SIZED + "void *c, void *a, void *b")
    rest = "infiniStatus_t infiniopCreateHandle(infiniopHandle_t *handle_ptr);"
    found = probe(install({"infiniop.h": rest, "infiniop/ops/add.h": good}, symbols_of("Add")))
    assert found.ops == frozenset() and found.notes["add"] == "its headers declare no infiniopCreateAddDescriptor"
    assert probe(install({"infiniop/ops/add.h": good}, symbols_of("Add"))).ops == {"add"}


TYPES = ["float", "int", "size_t", "void *", "const void *", "const size_t *", T, "infiniopRoPEAlgo_t", "unsigned int"]
GAPS = [" ", "\n    ", " /* in, out */ ", " // infiniopAdd(void *x);\n", "\t"]


@settings(derandomize=True, max_examples=60)
@given(
    st.lists(st.tuples(st.sampled_from(TYPES), st.sampled_from(["a", "b_desc", "x1", "size", ""])), max_size=9),
    st.lists(st.sampled_from(GAPS), min_size=12, max_size=12),
    st.sampled_from(["__C __export", "__INFINI_C __export", 'extern "C"', "", "[[nodiscard]]", "API(x)"]),
)
def test_declarations_are_read_however_they_are_laid_out(
    parameters: list[tuple[str, str]], gaps: list[str], macro: str
) -> None:
    inner = ",".join(f"{gaps[i]}{t}{gaps[i + 1]}{n}" for i, (t, n) in enumerate(parameters))
    text = f"#define X(a) infiniopNo(a)\n{macro} infiniStatus_t{gaps[0]}infiniopSome({inner}{gaps[11]});\ninline int f() {{ return infiniopSome(1); }}\n"
    (function,) = read_header(text)
    assert function.name == "infiniopSome"
    assert [(p.type, p.name) for p in function.parameters] == parameters


def test_declarations_that_are_hard_to_read() -> None:
    text = """
    struct Op { infiniStatus_t (*infiniopPointer)(int a); };
    typedef infiniStatus_t (*infiniopCallback_t)(void const *data);
    infiniStatus_t infiniopA(void const *const data, int (*callback)(int, float), const std::vector<std::pair<int, int>> &pairs, int n = f(1, 2),
                             size_t shape[4]) noexcept;
    namespace infini { extern "C" { infiniStatus_t infiniopB(void); } }
    #ifdef WITH_C
    infiniStatus_t infiniopC(unsigned long, struct InfiniopDescriptor *desc) __attribute__((visibility("default")));
    #else
    #endif
    const char *text = "infiniStatus_t infiniopD(int a);"; // infiniopE(
    """
    found = {f.name: [(p.type, p.name) for p in f.parameters] for f in read_header(text)}
    assert found == {
        "infiniopA": [
            ("const void *", "data"),
            ("int (*)(int, float)", "callback"),
            ("const std::vector<std::pair<int, int>> &", "pairs"),
            ("int", "n"),
            ("size_t *", "shape"),
        ],
        "infiniopB": [],
        "infiniopC": [("unsigned long", ""), ("InfiniopDescriptor *", "desc")],
    }


# --- libraries ------------------------------------------------------------------------------------------------------------------------------------


def test_exports_are_those_that_nm_finds(install: Callable[..., Path]) -> None:
    nm = shutil.which("nm")
    if nm is None:
        pytest.skip("nm is not installed")
    library = install(None, ["infiniopGemm"]) / "lib" / "libinfiniop.so"
    source = library.with_suffix(".cc")
    source.write_text(
        'extern "C" { int there() { return 0; } __attribute__((weak)) int weak() { return 0; } __attribute__((visibility("hidden"))) int hidden() { return 0; } '
        'int puts(const char *); int calls() { return puts(""); } int data = 1; } inline int one() { static int n; return ++n; } int two() { return one(); }'
    )
    fakes.compile_library(source, library)
    out = subprocess.run([nm, "-D", "--defined-only", str(library)], capture_output=True, text=True, check=True).stdout
    assert exported_symbols(library) == {line.split()[-1].split("@")[0] for line in out.splitlines()}
    assert {"there", "weak", "calls", "data"} <= exported_symbols(library)
    assert not {"hidden", "puts"} & exported_symbols(library)


def test_broken_installations(install: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(BuildError, match="found no lib/libinfinirt.so"):
        probe(tmp_path)
    root = install(None, [])
    library = root / "lib" / "libinfiniop.so"
    whole = library.read_bytes()
    for content, message in ((b"text", "is no shared library"), (whole[: len(whole) // 2], "cut off or damaged")):
        library.unlink()
        library.write_bytes(content)
        with pytest.raises(BuildError, match=message) as error:
            probe(root)
        assert str(library) in str(error.value)
    library.unlink()
    with pytest.raises(BuildError, match="found no lib/libinfiniop.so"):
        probe(root)
    with pytest.raises(BuildError, match="its libraries have no infinirtMalloc"):
        probe(install(None, [], core=[c for c in CORE if c != "infinirtMalloc"]))


@pytest.mark.parametrize(
    "symbols, ops, not_before",
    [
        # Nothing tells: what never changed counts.
        (symbols_of("Gemm", "CausalSoftmax"), {"gemm"}, ""),
        (["infiniopCreateTopkrouterDescriptor", "infiniopCreateRoPEv2Descriptor", *symbols_of("RoPE", "CausalSoftmax")], {"causal_softmax"}, "2025-09-02"),
        (["infiniopCreateTopkrouterDescriptor", *symbols_of("RoPE")], {"rope"}, "2025-09-16"),
        (symbols_of("PagedCaching", "PagedAttention", "PagedAttentionPrefill"), {"paged_attention"}, "2025-12-29"),
        (
            ["infinirtStreamBeginCapture", *symbols_of("PagedCaching", "PagedAttentionPrefill", "AddRMSNorm")],
            {"paged_caching", "paged_attention_prefill"},
            "2026-01-22",
        ),
        (symbols_of("Embedding", "AddRMSNorm", "LogSoftmax"), {"embedding", "add_rms_norm"}, "2026-02-13"),
        (["infinirtGetMemInfo", *symbols_of("LogSoftmax")], {"log_softmax"}, "2026-05-09"),
    ],
)  # fmt: skip
def test_without_headers_symbols_tell(
    symbols: list[str], ops: set[str], not_before: str, install: Callable[..., Path]
) -> None:
    found = probe(install(None, symbols))
    assert (found.source, found.ops, found.not_before) == ("symbols", ops, not_before)
    assert found.specs == CALLS and found.arguments == {}
    for name in {n for n in RECORD_OPS if f"infiniop{n}" in symbols and RECORD_OPS[n] not in ops}:
        assert "there are no headers" in found.notes[RECORD_OPS[name]]
    assert found.notes["mul"] == "its libraries have no infiniopCreateMulDescriptor"


# --- targets --------------------------------------------------------------------------------------------------------------------------------------


def test_a_target_is_narrowed_to_what_is_installed(era: Callable[..., Installed]) -> None:
    record, found = targets()["nvidia"], era("2026-01-20", "infinicclAllReduce", "infinirtStreamBeginCapture")
    target = narrow(record, found)
    assert set(target.ops) == found.ops & set(record.ops)
    assert (target.name, target.device, target.block_size) == (record.name, record.device, record.block_size)
    assert target.refusal("paged_caching", "bf16") == ""
    assert target.refusal("gemm", "bf16") == (
        f"gemm is not in the InfiniCore at {found.root}: its headers declare no infiniopCreateGemmDescriptor"
    )
    assert target.refusal("paged_caching", "i8") == record.refusal("paged_caching", "i8") != ""
    assert target.refusal("paged_attention", "bf16", 72) == record.refusal("paged_attention", "bf16", 72) != ""
    assert target.refusal("nothing", "bf16") == record.refusal("nothing", "bf16")
    assert target.collectives == ("AllReduce",) and target.collective_refusal("AllReduce", "bf16") == ""
    assert "its libraries have no infinicclBroadcast" in target.collective_refusal("Broadcast", "bf16")
    assert record.graph_capture and not target.graph_capture  # some of what capture takes is not there


def test_what_the_record_lacks_stays_away(install: Callable[..., Path]) -> None:
    """Every InfiniCore declares and exports all operators, whatever its device can do."""
    found = probe(install(ERAS / "2026-04-10", declared(ERAS / "2026-04-10")))
    target = narrow(targets()["cpu"], found)
    assert "paged_caching" in found.ops and "paged_caching" not in target.ops
    assert target.refusal("paged_caching", "bf16") == "cpu has no paged_caching"


def test_names_and_orders_belong_together() -> None:
    for spec in CALLS.values():
        create, call = PARAMETERS[spec.name]
        assert len(create.split()) == len(spec.create) and len(call.split()) == len(spec.call)
    assert set(PARAMETERS) == set(RECORD_OPS)
    ops = {op for record in targets().values() for op in record.ops}
    assert ops <= set(RECORD_OPS.values())
    for key, (older, _) in OLDER.items():
        assert set(older.create) <= set(CALLS[key].create) and sorted(older.call) == sorted(CALLS[key].call)


def test_manifests_record_the_orders(era: Callable[..., Installed]) -> None:
    specs = era("2026-01-20").specs
    assert calls.abi([specs["infini.paged_caching"], specs["infini.add_rms_norm"]]) == {
        "infiniopAddRMSNorm": [["o0", "i0", "i1", "i2", "epsilon", "o1"], ["o0", "i0", "i1", "i2", "o1"]],
        "infiniopPagedCaching": [["o0", "o1", "i2", "i3", "i4"]] * 2,
    }
    # What canaries assume where a manifest says nothing.
    today = {spec.name: [list(spec.create), list(spec.call)] for spec in CALLS.values()}
    assert {name: [c.split() for c in orders] for name, orders in canaries.ORDERS.items()} == {
        name: today[name] for name in canaries.ORDERS
    }


# --- what is really installed ---------------------------------------------------------------------------------------------------------------------


def test_the_embedded_library_has_todays_orders() -> None:
    from runtime import infinicpu

    found = probe(infinicpu.build())
    assert found.source == "headers" and found.embedded and found.specs == CALLS
    assert found.ops >= set(targets()["embedded"].ops)
    assert set(narrow(targets()["embedded"], found).ops) == set(targets()["embedded"].ops)


@pytest.mark.skipif(not REAL, reason="INFINI_ROOT is not set: no installed InfiniCore to read")
def test_an_installed_infinicore() -> None:
    found = probe(Path(REAL))
    assert found.source == "headers" and found.not_before >= "2025-09-16"
    floor = {"gemm", "rms_norm", "add", "swiglu", "rope", "causal_softmax", "rearrange", "random_sample"}
    assert floor <= found.ops and floor <= set(narrow(targets()["cpu"], found).ops)
    # A declared operator that is missing in the library, or in a form that is not known, says so.
    for op in set(RECORD_OPS.values()) - found.ops:
        assert found.notes[op]
    if found.not_before >= "2026-02-13":
        assert found.specs == CALLS
