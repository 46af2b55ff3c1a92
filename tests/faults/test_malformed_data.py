"""Malformed rows of HellaSwag, manifests and shards: each is refused by file (and line), and no total is ever wrong."""

import codecs
import io
import json
import os
import pickle
import shutil
import struct
import sys
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
import torch

import hellaswag_utils
import load_fineweb_dataset
import train
from hellaswag_utils import load_examples
from model import ModelConfig, Transformer
from model_folders import write_model
from preparation import prepare
from rows import SourceError
from shards import TokenStream, open_shard, verify
from tokenizer import Tokenizer

pytestmark = pytest.mark.faults

VOCAB = 512


@pytest.fixture(autouse=True)
def in_its_own_folder(tmp_path, monkeypatch, no_syncs):
    monkeypatch.chdir(tmp_path)
    for name in ("WANDB_API_KEY", "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def call(monkeypatch, capsys):
    """A function that calls main() of a script in this process. Returns the status, the output, and the error lines."""

    def call(module, *flags) -> tuple[int, str, list[str]]:
        monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *map(str, flags)])
        status = module.main()
        captured = capsys.readouterr()
        return status, captured.out, [line for line in captured.err.splitlines() if f"{module.__name__}.py: " in line]

    return call


# ---------------------------------------------------------------- HellaSwag

ROW = {"ind": 1, "ctx": "A cat", "endings": ["sat.", "flew away.", "", "<|end_of_text|>"], "label": 2}
GOOD = json.dumps(ROW).encode()


def row(**changes) -> bytes:
    return json.dumps(ROW | changes).encode()


def without(field: str) -> bytes:
    return json.dumps({name: value for name, value in ROW.items() if name != field}).encode()


def raw_label(text: str) -> bytes:
    return GOOD.replace(b'"label": 2', b'"label": ' + text.encode())


BAD_ROWS = {
    "no JSON": b"<html>not found</html>",
    "cut": GOOD[:-9],
    "two objects": GOOD + GOOD,
    "single quotes": str(ROW).encode(),
    "null": b"null",
    "a list": json.dumps([ROW]).encode(),
    "a text": json.dumps("ctx endings label").encode(),
    "a number": b"3",
    "nested lists": b"[" * 200_000,
    "nested objects": b'{"ctx":' * 200_000,
    "not UTF-8": GOOD.replace(b"A cat", b"A \xff cat"),
    "latin-1": GOOD.replace(b"A cat", b"Z\xfcrich"),
    "UTF-16": json.dumps(ROW).encode("utf-16"),
    "UTF-16 without a mark": json.dumps(ROW).encode("utf-16-le"),
    "a byte order mark within the file": codecs.BOM_UTF8 + GOOD,
    "NUL bytes": b"\0" * 100,
    "a NUL byte in a text": GOOD.replace(b"A cat", b"A\0cat"),
    "a lone surrogate in the context": row(ctx="A \ud83d cat"),
    "a lone surrogate in an ending": row(endings=["a", "b", "c", "\udc00"]),
    "a key twice": GOOD[:-1] + b', "label": 1}',
    "no context": without("ctx"),
    "no endings": without("endings"),
    "no label": without("label"),
    "context: null": row(ctx=None),
    "context: a number": row(ctx=3),
    "context: a list": row(ctx=["A cat"]),
    "endings: none": row(endings=[]),
    "endings: one": row(endings=["a"]),
    "endings: three": row(endings=["a", "b", "c"]),
    "endings: five": row(endings=["a", "b", "c", "d", "e"]),
    "endings: a text of four letters": row(endings="abcd"),
    "endings: an object of four": row(endings={"a": "", "b": "", "c": "", "d": ""}),
    "endings: null": row(endings=None),
    "endings: with a null": row(endings=["a", None, "c", "d"]),
    "endings: with a number": row(endings=["a", "b", 3, "d"]),
    "endings: with a list": row(endings=["a", "b", "c", ["d"]]),
    "label: 4": row(label=4),
    "label: -1": row(label=-1),
    "label: null": row(label=None),
    "label: true": row(label=True),
    "label: false": row(label=False),
    "label: 1.0": row(label=1.0),
    "label: 1.9": row(label=1.9),
    "label: an empty text": row(label=""),  # HellaSwag's own test split
    "label: 4 as a text": row(label="4"),
    "label: -1 as a text": row(label="-1"),
    "label: 1.0 as a text": row(label="1.0"),
    "label: 1 and a blank": row(label=" 1"),
    "label: 01": row(label="01"),
    "label: an Arabic 1": row(label="\u0661"),
    "label: a list": row(label=[1]),
    "label: NaN": raw_label("NaN"),
    "label: Infinity": raw_label("Infinity"),
    "label: 1e999": raw_label("1e999"),
    "label: 1e0": raw_label("1e0"),
    "label: a million digits": raw_label("9" * 10**6),
    "another number that is enormous": GOOD.replace(b'"ind": 1', b'"ind": 1e999'),
}
assert len(BAD_ROWS) > 50


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    config = ModelConfig(dim=32, n_layers=1, n_heads=2, n_kv_heads=1, vocab_size=VOCAB, multiple_of=32, max_seq_len=64)
    write_model(folder, dict(Transformer(config).named_parameters()), config)
    return folder


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer(vocab_size=VOCAB)


@pytest.mark.parametrize("kind", BAD_ROWS)
@pytest.mark.parametrize("place", ["in the middle", "last, without a line end"])
def test_a_malformed_row_is_named_by_file_and_line(tmp_path, tokenizer, model, call, kind, place):
    path = tmp_path / "hellaswag_val.jsonl"
    after = b"\n" + GOOD + b"\n" if place == "in the middle" else b""
    path.write_bytes(GOOD + b"\n\n" + GOOD + b"\n" + BAD_ROWS[kind] + after)
    with pytest.raises(ValueError) as error:
        load_examples(path, tokenizer)
    message = str(error.value)
    assert message.startswith(f"{path}, line 4: not a row of HellaSwag (") and message.endswith("); mend the line")
    assert len(message) < 400 and "\n" not in message
    assert len(load_examples(path, tokenizer, limit=2)) == 2  # the rows before it
    if place == "in the middle":
        status, out, lines = call(hellaswag_utils, "--checkpoint", model, "--data", path, "--device", "cpu")
        assert (status, out, len(lines)) == (1, "", 1) and f"{path}, line 4: " in lines[0]


GOOD_ROWS = {
    "blank lines": GOOD + b"\n\n \t\n" + GOOD + b"\n\n",
    "a byte order mark": codecs.BOM_UTF8 + GOOD + b"\n" + GOOD,
    "Windows line ends": GOOD + b"\r\n" + GOOD + b"\r\n",
    "labels as texts, as in the hub's file": row(label="0") + b"\n" + row(label="3"),
    "an emoji as two escapes": row(ctx="\U0001f999") + b"\n" + GOOD,
    "an escaped NUL, and other line separators": row(ctx="a\0b") + b"\n" + GOOD.replace(b" cat", "\x85\u2028".encode()),
    "empty texts": row(ctx="", endings=["", "", "", ""]) + b"\n" + GOOD,
    "other fields": row(source_id={"a": [None, 1.5]}) + b"\n" + GOOD,
}


@pytest.mark.parametrize("kind", GOOD_ROWS)
def test_what_is_only_unusual_is_counted(tmp_path, tokenizer, model, call, kind):
    path = tmp_path / "hellaswag_val.jsonl"
    path.write_bytes(GOOD_ROWS[kind])
    assert len(load_examples(path, tokenizer)) == 2
    status, out, _ = call(hellaswag_utils, "--checkpoint", model, "--data", path, "--device", "cpu")
    assert status == 0 and json.loads(out)["hellaswag_examples"] == 2


@pytest.mark.parametrize("kind", ["empty", "missing", "a folder"])
def test_a_file_that_holds_no_rows_is_named(tmp_path, model, call, kind):
    path = tmp_path / "rows.jsonl"
    if kind == "empty":
        path.touch()
    elif kind == "a folder":
        path.mkdir()
    status, out, lines = call(hellaswag_utils, "--checkpoint", model, "--data", path, "--device", "cpu")
    assert (status, out, len(lines)) == (1, "", 1) and "rows.jsonl" in lines[0]


# ---------------------------------------------------------------- manifests

TEXTS = [letter * n for letter, n in zip("abcdefghij", range(10, 110, 10), strict=True)]  # n + 2 tokens each
TRAIN_2 = "edufineweb_train_000002.npy"


@pytest.fixture(scope="module")
def template(tmp_path_factory) -> Path:
    """570 tokens of single bytes: 102 for validation, the others in shards of 120, 120, 120 and 108."""
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in [*TEXTS, ""]))
    options = {"vocab_size": VOCAB, "shard_size": 120, "val_fraction": 0.05}
    prepare([str(folder / "a.jsonl")], folder / "out", **options, show_progress=False)
    return folder


@pytest.fixture
def data(template, tmp_path) -> Path:
    return shutil.copytree(template / "out", tmp_path / "data")


def open_streams(data: Path) -> int:
    """Open both splits as training does. Returns the number of tokens."""
    fingerprint = Tokenizer(vocab_size=VOCAB).fingerprint
    return sum(len(TokenStream(data, split, vocab_size=VOCAB, fingerprint=fingerprint)) for split in ("train", "val"))


def train_flags(data: Path, tmp_path: Path) -> dict:
    shape = {"dim": 32, "n_layers": 1, "n_heads": 2, "n_kv_heads": 1, "vocab_size": VOCAB, "max_seq_len": 16}
    flags = {f"model.{name}": value for name, value in shape.items()}
    flags |= {"data_root": data, "out_dir": tmp_path / "run", "batch_size": 2, "total_batch_size": 32, "device": "cpu"}
    flags |= {"hellaswag_every": 0, "generate_every": 0, "max_steps": 1, "dtype": "float32", "compile": False}
    return flags


def assert_refused(data: Path, call, name: str, *, start: bool = True) -> None:
    """`--verify` refuses the folder and names the file; and so does training at its start, if it can see the damage."""
    status, out, lines = call(load_fineweb_dataset, "--out_dir", data, "--verify")
    assert (status, out, len(lines)) == (1, "", 1) and name in lines[0] and len(lines[0]) < 1000, lines
    if start:
        with pytest.raises((ValueError, OSError)) as error:
            open_streams(data)
        assert name in str(error.value) and "\n" not in str(error.value)


def test_the_folder_is_whole_before_it_is_damaged(data, call):
    assert open_streams(data) == 570
    status, out, _ = call(load_fineweb_dataset, "--out_dir", data, "--verify")
    assert status == 0 and "570 tokens" in out


MANIFESTS = {
    "empty": b"",
    "cut": b'{"format_version": 1, "vocab',
    "not UTF-8": b"\xff\xfe\x00",
    "NUL bytes": bytes(1000),
    "a pickle": pickle.dumps({"format_version": 1}),
    "an error page": b"<html>sorry</html>",
    "null": b"null",
    "a list": b"[]",
    "an empty object": b"{}",
    "nested lists": b'{"shards": ' + b"[" * 200_000,
    "nested objects": b'{"shards":' * 200_000,
    "a key twice": b'{"format_version": 1, "format_version": 1}',
    "NaN": b'{"format_version": NaN}',
    "1e999": b'{"format_version": 1, "tokens": 1e999}',
}


@pytest.mark.parametrize("kind", MANIFESTS)
def test_a_file_that_is_no_manifest_is_refused(data, call, kind):
    (data / "manifest.json").write_bytes(MANIFESTS[kind])
    assert_refused(data, call, "manifest.json: ")
    status, out, lines = call(load_fineweb_dataset, "--out_dir", data, "--stats")
    assert (status, out, len(lines)) == (1, "", 1) and "manifest.json: " in lines[0]


def set_in(*path):
    """A function that sets a value in a manifest: the last of the words, at the place that the others name."""
    *way, key, value = path

    def change(manifest):
        for step in way:
            manifest = manifest[step]
        manifest[key] = value

    return change


def drop(*path):
    *way, key = path

    def change(manifest):
        for step in way:
            manifest = manifest[step]
        del manifest[key]

    return change


def both(key, value):
    """A count of shard 2, and the total that fits it."""

    def change(manifest):
        manifest[key] += value - manifest["shards"][2][key]
        manifest["shards"][2][key] = value

    return change


def listed_twice(manifest):
    manifest["shards"].append(manifest["shards"][2])
    for key in ("tokens", "documents"):
        manifest[key] += manifest["shards"][2][key]


def left_out(manifest):
    shard = manifest["shards"].pop()
    for key in ("tokens", "documents"):
        manifest[key] -= shard[key]


def name_of(value):
    return set_in("shards", 2, "file", value)


CHANGES = {
    **{f"version {v!r}": set_in("format_version", v) for v in (0, 2, "1", None, [1], {})},
    **{f"no {key}": drop(key) for key in ("format_version", "vocab_size", "dtype", "tokens", "documents", "shards")},
    "no fingerprint": drop("tokenizer_fingerprint"),
    **{f"vocab_size {v!r}": set_in("vocab_size", v) for v in (0, -512, 511, 600, 2**40, 512.0, "512", True, None, [])},
    **{f"dtype {v!r}": set_in("dtype", v) for v in ("uint32", "int16", "object", "O", "x\n" * 10**5, 3, None, [])},
    **{f"fingerprint {v!r}": set_in("tokenizer_fingerprint", v) for v in ("0" * 64, "", None, 3, [])},
    **{f"total tokens {v!r}": set_in("tokens", v) for v in (-1, 0, 569, 571, 570.0, "570", True, None, 2**70)},
    **{f"total documents {v!r}": set_in("documents", v) for v in (-1, 9, 11, 10.0, "10", None)},
    **{f"shards {v!r}": set_in("shards", v) for v in (None, 3, "abc", {}, {"0": {}}, [3], [None], [[]], [{}])},
    **{f"no {key} of a shard": drop("shards", 2, key) for key in ("file", "split", "tokens", "documents", "sha256")},
    **{f"tokens {v!r}": both("tokens", v) for v in (119, 121, 0, -1, -(2**63), 2**62)},
    **{f"tokens {v!r} alone": set_in("shards", 2, "tokens", v) for v in (119, 120.0, "120", True, None, [120])},
    **{f"documents {v!r} alone": set_in("shards", 2, "documents", v) for v in (-1, 99, "1", 1.0, None)},
    **{f"bytes {v!r}": set_in("shards", 2, "text_bytes", v) for v in (-1, "1", 1.0, None)},
    **{f"sha256 {v!r}": set_in("shards", 2, "sha256", v) for v in (None, 3, [])},
    **{f"split {v!r}": set_in("shards", 2, "split", v) for v in ("val", "test", "", None, [])},
    "a shard listed twice": listed_twice,
    "shards in reverse": lambda manifest: manifest["shards"].reverse(),
    "no validation shard": lambda manifest: manifest["shards"].pop(0),
    "two shards exchanged": lambda manifest: manifest["shards"].insert(1, manifest["shards"].pop(2)),
    "another shard's name": name_of("edufineweb_train_000001.npy"),
    "a name with a folder": name_of("sub/" + TRAIN_2),
    "a name that leads out": name_of("../outside/" + TRAIN_2),
    "a name that leads out and back": name_of("../data/" + TRAIN_2),
    "a name with backslashes": name_of("..\\outside\\" + TRAIN_2),
    "a name with a drive": name_of("C:" + TRAIN_2),
    "a name with a NUL": name_of(TRAIN_2 + "\0"),
    "an empty name": name_of(""),
    "a name that is a dot": name_of("."),
    "a number for a name": name_of(3),
    "odd documents as a list": set_in("odd_documents", ["empty"]),
    "a text for a count of odd documents": set_in("odd_documents", {"empty": "1"}),
}


@pytest.fixture
def changed(data):
    def changed(change):
        manifest = json.loads((data / "manifest.json").read_text())
        change(manifest)
        (data / "manifest.json").write_text(json.dumps(manifest))
        return data

    return changed


@pytest.mark.parametrize("kind", CHANGES)
def test_a_manifest_that_lies_is_refused(data, changed, template, tmp_path, call, kind):
    shutil.copytree(template / "out", tmp_path / "outside")  # whoever followed a path would find a valid shard
    (data / "sub").mkdir()
    shutil.copy(data / TRAIN_2, data / "sub")
    changed(CHANGES[kind])
    named = TRAIN_2 if kind.startswith("tokens") and "alone" not in kind and "-" not in kind else "manifest.json: "
    if kind == f"tokens {2**62}":  # more than a count can be
        named = "manifest.json: "
    assert_refused(data, call, named)
    if named == "manifest.json: ":
        status, out, lines = call(load_fineweb_dataset, "--out_dir", data, "--stats")
        assert (status, out, len(lines)) == (1, "", 1) and named in lines[0]


def test_an_absolute_name_is_refused(data, changed, template, call):
    changed(name_of(str(template / "out" / TRAIN_2)))
    assert_refused(data, call, "manifest.json: ")


QUIET = {  # what the manifest alone does not betray: verify must read the shards
    "a document more": both("documents", 99),
    "a byte of text more": set_in("shards", 2, "text_bytes", 121),
    "another hash": set_in("shards", 2, "sha256", "0" * 64),
    "a hash in capitals": lambda manifest: set_in("shards", 2, "sha256", manifest["shards"][2]["sha256"].upper())(
        manifest
    ),
}


@pytest.mark.parametrize("kind", QUIET)
def test_verify_reads_what_the_start_of_a_run_does_not(data, changed, call, kind):
    changed(QUIET[kind])
    assert_refused(data, call, TRAIN_2, start=False)


def test_verify_names_a_shard_that_the_manifest_leaves_out(data, changed, call):
    changed(left_out)
    assert_refused(data, call, "edufineweb_train_000004.npy: not in the manifest", start=False)
    assert open_streams(data) == 570 - 108  # what the manifest says, not more


def test_the_same_command_refuses_a_finished_folder_whose_manifest_lies(template, tmp_path, changed):
    """It would print totals from the manifest."""
    options = {"vocab_size": VOCAB, "shard_size": 120, "val_fraction": 0.05, "show_progress": False}
    source, data = [str(template / "a.jsonl")], tmp_path / "data"
    assert prepare(source, data, **options)["tokens"] == 570
    for change in (set_in("tokens", 571), listed_twice, name_of("../outside/" + TRAIN_2), set_in("shards", [{}])):
        whole = (data / "manifest.json").read_bytes()
        changed(change)
        with pytest.raises(ValueError, match=r"manifest\.json: not a manifest"):
            prepare(source, data, **options)
        (data / "manifest.json").write_bytes(whole)
    for hub in ([3], [{}], ["name"], [{"name": "a"}], {}, None):
        whole = (data / "manifest.json").read_bytes()
        changed(set_in("hub", hub))
        with pytest.raises(SourceError, match=r"manifest\.json: not of this program"):
            prepare(source, data, **options)
        (data / "manifest.json").write_bytes(whole)


# ---------------------------------------------------------------- progress.json


@pytest.fixture
def unfinished(data) -> Path:
    """The folder as a kill leaves it, after the second training shard."""
    manifest = json.loads((data / "manifest.json").read_text())
    totals = ("documents", "tokens", "shards", "odd_documents")
    progress = {key: value for key, value in manifest.items() if key not in totals}
    progress |= {"document": 0, "batch": ["", "", 0], "tokens": 0, "train_tokens": 0, "val": {}, "odd_documents": {}}
    progress["shards"] = manifest["shards"][1:3]
    for name in ("manifest.json", "edufineweb_train_000003.npy", "edufineweb_train_000004.npy"):
        (data / name).unlink()
    (data / "edufineweb_val_000000.npy").unlink()
    (data / "progress.json").write_text(json.dumps(progress))
    return data


BAD_PROGRESS = {
    **{f"document {v!r}": {"document": v} for v in (-1, "1", 1.5, None, True, 2**70)},
    **{f"tokens {v!r}": {"tokens": v} for v in (-1, "1", None)},
    **{f"val {v!r}": {"val": v} for v in ({"tokens": -1}, {"tokens": 1}, {"a": "b"}, [], None, {"tokens": "x"})},
    **{f"odd documents {v!r}": {"odd_documents": v} for v in ({"empty": "x"}, {"empty": -1}, [], 3)},
    "a shard without a name": {"shards": [{"tokens": 120}]},
    "no description": {"shards": [3]},
}


@pytest.mark.parametrize("kind", BAD_PROGRESS)
def test_a_mark_of_progress_that_lies_is_refused(unfinished, template, kind):
    path = unfinished / "progress.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | BAD_PROGRESS[kind]))
    options = {"vocab_size": VOCAB, "shard_size": 120, "val_fraction": 0.05, "show_progress": False}
    before = {entry.name for entry in unfinished.iterdir()}
    with pytest.raises(SourceError, match=r"progress\.json: "):
        prepare([str(template / "a.jsonl")], unfinished, **options)
    assert {entry.name for entry in unfinished.iterdir()} == before


def test_a_mark_of_progress_names_only_its_own_shards(unfinished, template, tmp_path):
    outside = shutil.copytree(template / "out", tmp_path / "outside")
    before = {path: path.read_bytes() for path in outside.iterdir()}
    path = unfinished / "progress.json"
    options = {"vocab_size": VOCAB, "shard_size": 120, "val_fraction": 0.05, "show_progress": False}
    whole = json.loads(path.read_text())
    for name in ("../outside/" + TRAIN_2, str(outside / TRAIN_2), "sub/" + TRAIN_2, "edufineweb_train_000001.npy"):
        whole["shards"][1]["file"] = name
        path.write_text(json.dumps(whole))
        with pytest.raises(SourceError, match=r"progress\.json: damaged"):
            prepare([str(template / "a.jsonl")], unfinished, **options)
    whole["shards"] = []  # then the shards in the folder are to be written again
    path.write_text(json.dumps(whole))
    (unfinished / ".edufineweb_val_000000.npy.part").symlink_to(outside / "manifest.json")
    with pytest.raises(SourceError, match=r"edufineweb_val_000000\.npy\.part: a link"):
        prepare([str(template / "a.jsonl")], unfinished, **options)
    assert {path: path.read_bytes() for path in outside.iterdir()} == before


@pytest.mark.parametrize("target", ["file", "nowhere"])
@pytest.mark.parametrize("name", [".edufineweb_val_000000.npy.part", "edufineweb_train_000001.npy", "progress.json"])
def test_preparation_writes_through_no_link(template, tmp_path, name, target):
    """The folder is new but for a link with the name of one of its files."""
    (tmp_path / "file").write_text("precious")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).symlink_to(tmp_path / target)
    options = {"vocab_size": VOCAB, "shard_size": 120, "val_fraction": 0.05, "show_progress": False}
    try:
        manifest = prepare([str(template / "a.jsonl")], tmp_path / "out", **options)
    except (SourceError, OSError):
        manifest = None
    assert (tmp_path / "file").read_text() == "precious" and not (tmp_path / "nowhere").exists()
    assert manifest is None or verify(tmp_path / "out")


# ---------------------------------------------------------------- shards


def npy(header: str | bytes, data: bytes = b"", version: tuple[int, int] = (1, 0)) -> bytes:
    text = header.encode() if isinstance(header, str) else header
    return b"\x93NUMPY" + bytes(version) + struct.pack("<H" if version == (1, 0) else "<I", len(text)) + text + data


def header(shape: str, descr: str = "'<u2'") -> str:
    return f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}\n"


IDS = np.full(120, 97, dtype=np.uint16)


def saved(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def trapped_objects(marker: Path) -> bytes:
    class Trap:
        def __reduce__(self):
            return open, (str(marker), "w")

    return saved(np.array([Trap()] * 120, dtype=object))


BAD_SHARDS = {
    "empty": b"",
    "magic alone": b"\x93NUMPY",
    "cut in the header": saved(IDS)[:50],
    "cut in the ids": saved(IDS)[:-1],
    "no ids": saved(IDS)[:128],
    "a byte more": saved(IDS) + b"\0",
    "shorter": saved(IDS[:-1]),
    "longer": saved(np.append(IDS, IDS)),
    "of length 0": saved(IDS[:0]),
    "garbage": bytes(range(256)) + bytes(112),
    "NUL bytes": bytes(368),
    "a zip file": b"PK\3\4" + bytes(364),
    "a pickle": pickle.dumps(list(range(120))),
    "two-dimensional": saved(IDS.reshape(2, 60)),
    "a column": saved(IDS[:, None]),
    "without dimensions": saved(np.array(97, dtype=np.uint16)),
    "of floats": saved(IDS.astype(np.float32)),
    "of halves, as long": saved(IDS.astype(np.float16)),
    "signed, as long": saved(IDS.astype(np.int16)),
    "wider": saved(IDS.astype(np.uint32)),
    "of bytes": saved(IDS.astype(np.uint8)),
    "in another byte order": saved(IDS.astype(">u2")),
    "of texts": saved(IDS.astype("S1")),
    "of pairs": npy(header("(120,)", "[('a', '<u2')]"), bytes(240)),
    "of nothing": npy(header("(120,)", "'|V0'")),
    "of objects": npy(header("(120,)", "'|O'"), pickle.dumps([1] * 120)),
    "a shape of 2**62": npy(header(f"({2**62},)"), bytes(240)),
    "a shape of 2**63 + 120": npy(header(f"({2**63 + 120},)"), bytes(240)),
    "a shape of 10**30": npy(header(f"({10**30},)"), bytes(240)),
    "a negative shape": npy(header("(-120,)"), bytes(240)),
    "a shape of fractions": npy(header("(120.0,)"), bytes(240)),
    "a shape that is true": npy(header("(True,)"), bytes(2)),
    "a shape of a million digits": npy(header(f"({'1' * 9000},)"), bytes(240)),
    "nested brackets": npy("(" * 4000 + "1" + ")" * 4000),
    "open brackets": npy("[" * 9000),
    "minus without end": npy("-" * 9000 + "1"),
    "code as a header": npy("__import__('os').system('touch ran')\n"),
    "code as a shape": npy(header("(open('ran', 'w'),)"), bytes(240)),
    "code as a type": npy(header("(120,)", "open('ran', 'w')"), bytes(240)),
    "a type that is a tuple": npy(header("(120,)", "('S',)"), bytes(240)),
    "a type that is an object": npy(header("(120,)", "{}"), bytes(240)),
    "another version": npy(header("(120,)"), bytes(240), (9, 9)),
    "a header that is not text": npy(b"\xff\xfe{", bytes(240)),
    "a header beyond the file": b"\x93NUMPY\x02\x00" + struct.pack("<I", 2**32 - 1) + b"{",
}


@pytest.mark.parametrize("kind", BAD_SHARDS)
def test_a_bad_shard_is_refused_by_its_name(data, changed, call, kind):
    content = BAD_SHARDS[kind]
    (data / TRAIN_2).write_bytes(content)
    assert_refused(data, call, TRAIN_2)
    changed(set_in("shards", 2, "sha256", sha256(content).hexdigest()))  # and where the hash fits
    assert_refused(data, call, TRAIN_2)
    assert not Path("ran").exists()


def test_code_in_a_shard_is_not_run(data, changed, call, tmp_path):
    content = trapped_objects(tmp_path / "code ran")
    np.load(io.BytesIO(content), allow_pickle=True)
    (tmp_path / "code ran").unlink()  # so the file is hostile
    (data / TRAIN_2).write_bytes(content)
    changed(set_in("shards", 2, "sha256", sha256(content).hexdigest()))
    assert_refused(data, call, TRAIN_2)
    with pytest.raises(ValueError, match="Python objects"):
        open_shard(data / TRAIN_2)
    assert not (tmp_path / "code ran").exists()


@pytest.mark.parametrize("index", [0, 1, 4])
@pytest.mark.parametrize("kind", ["missing", "a folder", "a pipe", "a link to itself", "a link to nothing"])
def test_a_shard_that_is_no_file_is_refused(data, call, index, kind):
    path = sorted(data.glob("*.npy"))[index - 1 if index else -1]  # the validation shard is the last by name
    path.unlink()
    if kind == "a folder":
        path.mkdir()
    elif kind == "a pipe":
        os.mkfifo(path)
    elif kind.startswith("a link"):
        path.symlink_to(path if "itself" in kind else "nowhere")
    assert_refused(data, call, path.name)


def test_a_link_to_a_shard_is_read(data, call, tmp_path):
    """A user may keep the shards on another disk."""
    (data / TRAIN_2).rename(tmp_path / "elsewhere.npy")
    (data / TRAIN_2).symlink_to(tmp_path / "elsewhere.npy")
    assert open_streams(data) == 570
    assert call(load_fineweb_dataset, "--out_dir", data, "--verify")[0] == 0


@pytest.mark.parametrize("value", [VOCAB, 2**16 - 1])
@pytest.mark.parametrize("place", [0, 60, -1])
def test_an_id_beyond_the_vocabulary_is_refused(data, changed, call, value, place):
    ids = np.load(data / TRAIN_2)
    ids[place] = value
    np.save(data / TRAIN_2, ids)
    assert_refused(data, call, TRAIN_2)
    changed(set_in("shards", 2, "sha256", sha256((data / TRAIN_2).read_bytes()).hexdigest()))
    assert_refused(data, call, f"{TRAIN_2}: ")
    status, out, lines = call(load_fineweb_dataset, "--out_dir", data, "--stats")
    assert (status, out, len(lines)) == (1, "", 1) and TRAIN_2 in lines[0]


def test_verify_sees_every_flipped_bit_of_a_body(data, call):
    """An id that stays in the vocabulary is nothing that the start of a run could see."""
    whole = (data / TRAIN_2).read_bytes()
    for place in range(128, len(whole), 16):
        flipped = bytearray(whole)
        flipped[place] ^= 1
        (data / TRAIN_2).write_bytes(flipped)
        assert_refused(data, call, TRAIN_2, start=False)


def test_documents_that_a_hash_does_not_betray_are_counted_again(data, changed, call):
    """Ids, hash and number of tokens fit; the documents do not."""
    ids = np.load(data / TRAIN_2)
    ids[5] = Tokenizer(vocab_size=VOCAB).bos_id
    np.save(data / TRAIN_2, ids)
    changed(set_in("shards", 2, "sha256", sha256((data / TRAIN_2).read_bytes()).hexdigest()))
    assert_refused(data, call, f"{TRAIN_2}: ", start=False)


# ---------------------------------------------------------------- training

STARTS = {
    "no JSON": lambda data: (data / "manifest.json").write_bytes(b"{"),
    "nested lists": lambda data: (data / "manifest.json").write_bytes(MANIFESTS["nested lists"]),
    "a shard missing": lambda data: (data / TRAIN_2).unlink(),
    "a shard cut": lambda data: (data / TRAIN_2).write_bytes((data / TRAIN_2).read_bytes()[:-1]),
    "a shard of objects": lambda data: (data / TRAIN_2).write_bytes(BAD_SHARDS["of objects"]),
    "a header that lies": lambda data: (data / TRAIN_2).write_bytes(BAD_SHARDS["a shape of 2**62"]),
    "minus without end": lambda data: (data / TRAIN_2).write_bytes(BAD_SHARDS["minus without end"]),
}


@pytest.mark.parametrize("kind", STARTS)
def test_training_refuses_at_its_start(data, tmp_path, call, kind):
    STARTS[kind](data)
    flags = [word for name, value in train_flags(data, tmp_path).items() for word in (f"--{name}", value)]
    status, _, lines = call(train, *flags)
    assert status == 1 and len(lines) == 1
    assert str(data) in lines[0] and ("manifest.json" in lines[0] or TRAIN_2 in lines[0])
    assert not (tmp_path / "run").exists()


def test_training_refuses_rows_of_hellaswag_at_its_start(data, tmp_path, call):
    (tmp_path / "rows.jsonl").write_bytes(GOOD + b"\n" + BAD_ROWS["label: true"] + b"\n")
    changes = {"hellaswag_path": tmp_path / "rows.jsonl", "hellaswag_every": 1}
    flags = [word for name, value in (train_flags(data, tmp_path) | changes).items() for word in (f"--{name}", value)]
    status, _, lines = call(train, *flags)
    assert status == 1 and len(lines) == 1 and "rows.jsonl, line 2: " in lines[0]


def test_the_training_that_is_refused_above_runs_where_nothing_is_damaged(data, tmp_path, call):
    threads = torch.get_num_threads()
    flags = [word for name, value in train_flags(data, tmp_path).items() for word in (f"--{name}", value)]
    status, _, lines = call(train, *flags)
    torch.set_num_threads(threads)
    assert (status, lines) == (0, [])
