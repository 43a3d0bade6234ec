"""The format of the records, the command that shows them, and the page that says how to add one."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import passes.targets as module
from codegen.__main__ import main
from ir.errors import ConfigError, run_cli
from ir.text import to_text
from passes.legalise import FORMS
from passes.targets import OPERANDS, TARGETS, OpSupport, Target, load, record_of, target_of, targets
from tests.passes.test_targets import ATTENTION, BASIC, DEVICES, RECORDS, form

ROOT = Path(__file__).parents[2]
FILE = Path(module.__file__).parent / "targets.json"


# --- the format -----------------------------------------------------------------------------------------------------------------------------------


def test_one_op_per_line():
    lines = FILE.read_text(encoding="utf-8").splitlines()
    found = [m[1] for line in lines if (m := re.fullmatch(r'  "(\w+)": (\{.*\}),?', line)) and json.loads(m[2])]
    assert found == [op for record in json.loads(FILE.read_text(encoding="utf-8")).values() for op in record["ops"]]


def test_no_free_key_is_spelled_out():
    for name, raw in json.loads(FILE.read_text(encoding="utf-8")).items():
        assert record_of(targets()[name]) == {"name": name, "collective_capture": False, **raw}, name


EXAMPLE = record_of(targets()["ascend"])


@pytest.mark.parametrize(
    "where, key, value, text",
    [
        ((), "name", "a b", "a target's record: name is 'a b', expected an identifier"),
        ((), "speed", 3, "target ascend: unknown key 'speed'; known are name, device"),
        ((), "device", -1, "target ascend: device is -1, expected a number from 0"),
        ((), "device", True, "target ascend: device is True, expected a number from 0"),
        ((), "graph_capture", None, "target ascend: graph_capture is None, expected true or false"),
        (
            (),
            "collectives",
            ["Allreduce"],
            "target ascend: collectives is ['Allreduce'], expected a list of CommInitAll",
        ),
        ((), "collective_dtypes", ["fp16"], "target ascend: collective_dtypes is ['fp16'], expected a list of dtypes"),
        ((), "block_size", 0, "target ascend: block_size is 0, expected a number from 1"),
        ((), "notes", "a", "target ascend: notes is 'a', expected a list of lines"),
        ((), "ops", [], "target ascend: ops is [], expected an object"),
        (("ops",), "gem", {"dtypes": ["f32"]}, "target ascend: gem: is no op; known are gemm, rms_norm"),
        (("ops",), "gemm", {}, "target ascend: gemm: dtypes is missing"),
        (("ops",), "gemm", 3, "target ascend: gemm: dtypes is missing"),
        (("ops", "gemm"), "alpha", 1, "target ascend: gemm: unknown key 'alpha'; known are dtypes, index_dtypes"),
        (("ops", "gemm"), "dtypes", ["f16", "f16"], "target ascend: gemm: dtypes is ['f16', 'f16'], expected a list"),
        (("ops", "gemm"), "since", "2026", "target ascend: gemm: since is '2026', expected a date as 2026-02-13"),
        (("ops", "gemm"), "alphas", [1, 0], "target ascend: gemm: alphas is [1, 0], expected a list of pairs"),
        (
            ("ops", "gemm"),
            "graph_capture",
            "yes",
            "target ascend: gemm: graph_capture is 'yes', expected true, false or",
        ),
        (
            ("ops", "gemm"),
            "ranks",
            [2, "3"],
            "target ascend: gemm: ranks is [2, '3'], expected a list of numbers from 0",
        ),
        (("ops", "gemm"), "last_multiple", 0, "target ascend: gemm: last_multiple is 0, expected a number from 1"),
        (("ops", "gemm"), "contiguous", [0, 3], "target ascend: gemm: contiguous names operand 3, of 3"),
        (("ops", "swiglu"), "clobbers", [-1], "target ascend: swiglu: clobbers is [-1], expected a list of numbers"),
        (("ops", "swiglu"), "notes", ["a\nb"], "target ascend: swiglu: notes is ['a\\nb'], expected a list of lines"),
    ],
)
def test_a_wrong_record_is_refused_in_one_line(where, key, value, text, tmp_path):
    record = copy.deepcopy(EXAMPLE)
    inner = record
    for step in where:
        inner = inner[step]
    inner[key] = value
    with pytest.raises(ConfigError) as caught:
        target_of(record)
    assert str(caught.value).startswith(text) and "\n" not in str(caught.value)


@pytest.mark.parametrize("key", ["device", "graph_capture", "collectives", "ops"])
def test_a_record_without_a_key_is_refused(key):
    with pytest.raises(ConfigError, match=f"target ascend: {key} is missing"):
        target_of({k: v for k, v in EXAMPLE.items() if k != key})


def test_a_wrong_file_is_refused(tmp_path):
    file = tmp_path / "records.json"
    for text, found in (
        ("{", "not readable as JSON"),
        ("[]", "expected an object"),
        ('{"a": 1}', "expected an object"),
    ):
        file.write_text(text)
        with pytest.raises(ConfigError, match=f"{file.name}: {found}"):
            load(file)
    file.write_text('{"twelfth": {"device": 11}}')
    with pytest.raises(ConfigError, match=f"{file.name}: target twelfth: graph_capture is missing"):
        load(file)
    with pytest.raises(ConfigError, match="not readable as JSON"):
        load(tmp_path / "none.json")


def _supports(op: str) -> st.SearchStrategy[OpSupport]:
    dtypes = st.lists(st.sampled_from(["f16", "bf16", "f32", "i32"]), min_size=1, unique=True).map(tuple)
    sizes = st.lists(st.integers(1, 512), unique=True, max_size=3).map(tuple)
    operands = st.lists(st.integers(0, len(OPERANDS[op]) - 1), unique=True, max_size=3).map(tuple)
    size = st.none() | st.integers(1, 1 << 20)
    return st.builds(
        OpSupport,
        dtypes=dtypes,
        index_dtypes=st.just(()) | dtypes,
        head_dims=sizes,
        since=st.just("") | st.dates().map(str),
        uncertain=st.booleans(),
        graph_capture=st.sampled_from([None, True, False]),
        ranks=sizes,
        last_multiple=size,
        row_major_output=st.booleans(),
        single_batch_dtypes=st.just(()) | dtypes,
        alphas=st.just(()) | st.just(((1, 0),)) | st.just(((1, 0), (0.5, 1))),
        unit_last_stride=operands,
        packed_heads=operands,
        contiguous=operands,
        max_row_bytes=size,
        clobbers=operands,
        notes=st.lists(st.text("ab ,", min_size=1), unique=True, max_size=2).map(tuple),
    )


@settings(derandomize=True, max_examples=60, deadline=None)
@given(st.data())
def test_records_and_targets_are_the_same(data):
    names = data.draw(st.lists(st.sampled_from(list(OPERANDS)), unique=True, max_size=4))
    target = Target(
        "odd",
        data.draw(st.integers(0, 99)),
        {name: data.draw(_supports(name)) for name in names},
        data.draw(st.booleans()),
        data.draw(st.sampled_from([(), BASIC])),
        data.draw(st.sampled_from([(), ("f32", "i64")])),
        data.draw(st.booleans()),
        data.draw(st.integers(1, 64)),
        ("a note",),
    )
    assert target_of(json.loads(json.dumps(record_of(target)))) == target


# --- the command ----------------------------------------------------------------------------------------------------------------------------------


def test_the_table(capsys):
    assert main(["targets"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["target", "embedded", *DEVICES]
    ascend = next(line for line in lines if line.startswith("ascend"))
    assert re.split(r"\s{2,}", ascend) == [
        "ascend",
        "3",
        "AllReduce",
        "yes",
        "contiguous",
        "paged",
        "paged",
        "add, rms_norm for add_rms_norm; an uncut head for AllGather",
        "mul, silu",
    ]
    assert main(["targets", "--json"]) == 0
    rows = {row["target"]: row for row in json.loads(capsys.readouterr().out)}
    assert {name: row["device"] for name, row in rows.items() if name != "embedded"} == {
        name: str(device) for name, device in DEVICES.items()
    }
    assert rows["moore"]["KV bf16"] == "contiguous (paged if asked)" and rows["moore"]["KV f32"] == "contiguous"
    assert rows["cpu"]["collectives"] == "none" and rows["qy"]["collectives"] == "all"


@pytest.mark.parametrize("name", RECORDS)
def test_one_target_in_detail(name, capsys):
    assert main(["targets", name]) == 0
    text = capsys.readouterr().out
    assert text.startswith(f"{name}: device {DEVICES.get(name, 0)}, ") and max(map(len, text.splitlines())) <= 140
    for op in (*FORMS, *targets()[name].ops):
        assert f"\n  {op} " in text, op
    assert main(["targets", name, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["target"] == name and found["ops"].keys() == targets()[name].ops.keys()
    bf16 = found["forms"]["attention_cached"]["bf16"]
    assert bf16[0] == ATTENTION[name][1] and (bf16[1] == "") == (bf16[0] == "paged")


def test_reasons_constraints_notes_and_dates_are_told(capsys):
    main(["targets", "ascend"])
    words = " ".join(capsys.readouterr().out.split())
    for expected in (
        "attention_cached contiguous [f32] not paged: paged_attention on ascend takes f16, bf16, not f32",
        "add_rms_norm add, rms_norm not add_rms_norm: ascend has no add_rms_norm",
        "gemm f16, bf16, f32; replayable c of rank 2 or 3 c row by row, its row stride not 1 (alpha, beta) only (1, 0) or (1, 1)",
        "last dimension of c a multiple of 8",
        "destroys x (masks its input in place)",
        "random_sample f16, bf16, f32, f64; indices i32, i64; not replayable",
        "2026-06-15 embedding",
        "2026-06-16 paged_attention, paged_attention_prefill, paged_caching",
        "0.1.0 (--infinicore any) has not enough for a model: add_rms_norm: add_rms_norm: ascend has no add_rms_norm; "
        "add, rms_norm: add on ascend is not in InfiniCore 0.1.0 (there since 2026-05-29: --infinicore DIR for an installation that has it)",
    ):
        assert expected in words, expected
    main(["targets", "cambricon"])
    words = " ".join(capsys.readouterr().out.split())
    assert "paged_attention_prefill f16, bf16; indices i32, i64, u32; head_dim 64, 128, 192, 256; UNCERTAIN" in words
    assert "0.1.0 (--infinicore any) has enough for a model" in words


def test_an_unknown_target_is_refused(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["codegen", "targets", "tpu"])
    with pytest.raises(SystemExit) as caught:
        raise SystemExit(run_cli(main))
    assert caught.value.code == 2 and "tpu" in capsys.readouterr().err


# --- docs/adding-a-target.md ----------------------------------------------------------------------------------------------------------------------

PAGE = ROOT / "docs" / "adding-a-target.md"


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.M | re.S)


def test_the_page_s_twelfth_target_compiles_as_it_says(tmp_path, monkeypatch, capsys):
    (record,), (program,), (printed,) = blocks("json"), blocks("python"), blocks("text")
    (tmp_path / "twelfth.json").write_text(record, encoding="utf-8")
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(compile(program, PAGE.name, "exec"), names)  # noqa: S102 - it is our own page
    assert capsys.readouterr().out == printed
    target, graph = names["target"], names["program"].graph
    assert target == target_of(record_of(target)) and target.name not in TARGETS
    used = set(re.findall(r"\binfini\.(\w+)", to_text(graph)))  # layers are bodies of a loop
    assert not used & {"embedding", "gather_rows", "add_rms_norm", "paged_caching", "paged_attention_ragged"}
    assert {"copy_rows", "copy_chosen_rows", "add", "rms_norm", "all_reduce"} <= used
    assert graph.type("positions").dtype == "i64" and graph.meta["inner_multiple"] == 32
    assert set(re.findall(r"alpha=([\d.]+)", to_text(graph))) == {"1.0"}


def test_the_page_names_every_key():
    cells = set(re.findall(r"^\| `(\w+)` \|", PAGE.read_text(encoding="utf-8"), re.M))
    assert cells == (set(module._RECORD) | set(module._OP)) - {"name"}


def test_a_target_may_lack_bf16_and_embedding():
    ops = {op: dict(fields) for op, fields in record_of(targets()["cpu"])["ops"].items() if op != "embedding"}
    ops["rms_norm"]["dtypes"] = ["f16", "f32"]
    target = target_of(dict(name="early", device=0, graph_capture=False, collectives=[], ops=ops))
    assert form(target, "embedding", "f16") == "one copy per token"
    assert form(target, "gather_rows", "f16") == "one copy per row"
    assert form(target, "norm_rope", "bf16") == form(target, "rms_norm", "bf16") == "none"
    assert form(target, "norm_rope", "f16") == "rms_norm, rope"
    assert target.refusal("rms_norm", "bf16") == "rms_norm on early takes f16, f32, not bf16"
