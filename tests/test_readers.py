"""Every format, compressed or not, from its first document or from any other; and what is said about broken files."""

import bz2
import codecs
import csv
import gzip
import json
import lzma
import os
import random
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

import readers
import rows
from preparation import prepare
from readers import COMPRESSIONS, BadRow
from rows import ReadOptions, SourceError
from sources import open_source

DOCUMENTS = [
    "The quick brown fox, and the lazy dog.\n",
    'She said: "Zürich, 東京 🦙"\nand left.',
    "'single', \"double\", \\backslash\\, ,comma,",
    " \t spaces ",
    "2024-05-01",  # stays text: some readers make a timestamp of it
    "12345",
    "long " * 3000,
    *[f"document {i}" for i in range(60)],
]


def as_csv(path, documents):
    with open(path, "w", encoding="utf-8", newline="") as file:
        lines = csv.writer(file)
        lines.writerow(["id", "text"])
        lines.writerows(enumerate(documents))


def as_json_lines(path, documents):
    lines = [json.dumps({"id": i, "text": text}, ensure_ascii=i % 2 == 0) for i, text in enumerate(documents)]
    path.write_text("\n".join(lines), encoding="utf-8")


def as_json_array(path, documents):
    rows = [{"id": i, "text": text, "more": {"text": "no"}} for i, text in enumerate(documents)]
    path.write_text(json.dumps(rows, indent=1), encoding="utf-8")


def table(documents):
    return pyarrow.table({"id": list(range(len(documents))), "text": documents})


def as_arrow_file(path, documents):
    with pyarrow.ipc.new_file(path, table(documents).schema) as file:
        file.write_table(table(documents), max_chunksize=25)


def as_arrow_stream(path, documents):
    with pyarrow.ipc.new_stream(path, table(documents).schema) as file:
        file.write_table(table(documents), max_chunksize=25)


def as_parquet(path, documents):
    pyarrow.parquet.write_table(table(documents), path, row_group_size=25)


def as_separated_text(path, documents):
    path.write_text("<|endoftext|>\n".join(documents), encoding="utf-8", newline="")


WRITERS = {
    "a.jsonl": as_json_lines,
    "a.ndjson": as_json_lines,
    "lines.json": as_json_lines,
    "array.json": as_json_array,
    "a.csv": as_csv,
    "a.parquet": as_parquet,
    "file.arrow": as_arrow_file,
    "stream.arrow": as_arrow_stream,
}


def compress(path, suffix):
    content, target = path.read_bytes(), path.with_name(path.name + suffix)
    if suffix == ".zst":
        with pyarrow.CompressedOutputStream(target, "zstd") as file:
            file.write(content)
    elif suffix:
        target.write_bytes({".gz": gzip, ".bz2": bz2, ".xz": lzma}[suffix].compress(content))
    return target


def batches(*paths, first=0, before=None, bad_rows=0, **options):
    return list(open_source([str(path) for path in paths], ReadOptions(**options)).read(first, before, bad_rows))


def documents(*paths, **options):
    """All documents of the files, as a list."""
    found = []
    for batch in batches(*paths, **options):
        found += batch.documents if isinstance(batch.documents, list) else batch.documents.to_pylist()
    return found


@pytest.fixture
def small_batches(monkeypatch):
    monkeypatch.setattr(readers, "BATCH_DOCUMENTS", 7)


# ---------------------------------------------------------------- formats


@pytest.mark.parametrize("compression", ["", *COMPRESSIONS, ".GZ"])
@pytest.mark.parametrize("name", WRITERS)
def test_every_format_gives_every_document_once_in_order(tmp_path, small_batches, name, compression):
    path = tmp_path / (name.upper() if compression == ".GZ" else name)
    WRITERS[name](path, DOCUMENTS)
    packed = compress(path, compression.lower())
    if compression == ".GZ":
        packed = packed.rename(packed.with_suffix(".GZ"))
    assert documents(packed) == DOCUMENTS


@pytest.mark.parametrize("name", [name for name in WRITERS if name != "a.ndjson"])
def test_the_documents_are_those_that_datasets_reads(tmp_path, name):
    import datasets

    texts = [text for text in DOCUMENTS if text != "2024-05-01"]  # where `datasets` differs
    WRITERS[name](tmp_path / name, texts)
    builder = {"jsonl": "json"}.get(kind := name.rpartition(".")[2], kind)
    theirs = datasets.load_dataset(builder, data_files=str(tmp_path / name), cache_dir=str(tmp_path / "cache"))
    assert documents(tmp_path / name) == [str(text) for text in theirs["train"]["text"]]


def test_a_folder_that_datasets_has_saved_can_be_read(tmp_path):
    import datasets

    datasets.DatasetDict({"train": datasets.Dataset.from_dict({"text": DOCUMENTS})}).save_to_disk(tmp_path / "saved")
    assert documents(tmp_path / "saved") == DOCUMENTS


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("first", [1, 7, 24, 25, 26, 60, len(DOCUMENTS) - 1, len(DOCUMENTS)])
def test_reading_can_start_at_any_document(tmp_path, small_batches, name, first):
    WRITERS[name](tmp_path / name, DOCUMENTS)
    other = tmp_path / "other.jsonl"
    as_json_lines(other, ["one", "two", "three"])
    assert documents(tmp_path / name, other, first=first) == [*DOCUMENTS, "one", "two", "three"][first:]
    assert documents(tmp_path / name, other, first=len(DOCUMENTS) + 2) == ["three"]


@pytest.mark.parametrize("block", [1, 7, 100])
def test_a_json_array_is_read_in_blocks_of_any_size(tmp_path, monkeypatch, block):
    monkeypatch.setattr(rows, "BLOCK_BYTES", block)
    as_json_array(tmp_path / "a.json", DOCUMENTS[:7] + DOCUMENTS[-3:])
    assert documents(tmp_path / "a.json") == DOCUMENTS[:7] + DOCUMENTS[-3:]


def test_compressed_files_may_have_several_parts(tmp_path):
    for suffix in COMPRESSIONS:
        parts = b""
        for i in range(3):
            as_json_lines(tmp_path / "part.jsonl", [f"part {i}"])
            (tmp_path / "part.jsonl").write_text((tmp_path / "part.jsonl").read_text() + "\n")
            parts += compress(tmp_path / "part.jsonl", suffix).read_bytes()
        (tmp_path / f"a.jsonl{suffix}").write_bytes(parts)
        assert documents(tmp_path / f"a.jsonl{suffix}") == ["part 0", "part 1", "part 2"]


@pytest.mark.parametrize("compression", COMPRESSIONS)
@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet", "array.json"])
def test_a_compressed_file_that_is_cut_is_refused(tmp_path, name, compression):
    WRITERS[name](tmp_path / name, DOCUMENTS * 20)
    packed = compress(tmp_path / name, compression)
    packed.write_bytes(packed.read_bytes()[: packed.stat().st_size // 2])
    with pytest.raises(SourceError) as error:
        documents(packed)
    assert str(error.value).startswith(f"{packed}")


def test_another_column_can_be_named_in_every_format(tmp_path):
    texts = ["one", "two"]
    as_csv(tmp_path / "a.csv", texts)
    as_json_lines(tmp_path / "a.jsonl", texts)
    as_json_array(tmp_path / "a.json", texts)
    for name in ("a.csv", "a.jsonl", "a.json"):
        path = tmp_path / name
        path.write_text(path.read_text().replace("text", "body"))
        assert documents(path, text_column="body") == texts
    pyarrow.parquet.write_table(pyarrow.table({"body": texts}), tmp_path / "a.parquet")
    assert documents(tmp_path / "a.parquet", text_column="body") == texts


# ---------------------------------------------------------------- what a resumed run compares


@pytest.mark.parametrize("name", WRITERS)
def test_every_batch_can_be_reached_again_with_its_digest(tmp_path, small_batches, name):
    as_json_lines(tmp_path / "first.jsonl", ["one", "two"])
    WRITERS[name](tmp_path / name, DOCUMENTS)
    paths = (tmp_path / "first.jsonl", tmp_path / name)
    place, all_batches = 0, batches(*paths)
    for batch in all_batches:
        again = batches(*paths, first=place, before=(*batch[1:], len(batch.documents)))
        assert again[0].digest == batch.digest
        place += len(batch.documents)
    as_json_lines(tmp_path / "first.jsonl", ["one", "2"])
    with pytest.raises(SourceError, match="changed where an earlier run has read it"):
        batches(*paths, first=place - 1, before=(*all_batches[-1][1:], 1))


@pytest.mark.parametrize("name", ["a.jsonl", "array.json", "a.csv"])
def test_rows_that_no_run_has_read_may_change(tmp_path, small_batches, name):
    WRITERS[name](tmp_path / name, DOCUMENTS)
    batch = batches(tmp_path / name)[3]
    WRITERS[name](tmp_path / name, [*DOCUMENTS[:40], "another", *DOCUMENTS[41:]])
    assert documents(tmp_path / name, first=21, before=(*batch[1:], len(batch.documents)))[19] == "another"
    WRITERS[name](tmp_path / name, [*DOCUMENTS[:20], "another", *DOCUMENTS[21:]])
    with pytest.raises(SourceError, match="changed"):
        documents(tmp_path / name, first=21, before=(*batch[1:], len(batch.documents)))


def test_a_source_that_has_become_too_short_is_refused(tmp_path, small_batches):
    as_json_lines(tmp_path / "a.jsonl", DOCUMENTS)
    batch = batches(tmp_path / "a.jsonl")[5]
    as_json_lines(tmp_path / "a.jsonl", DOCUMENTS[1:8])
    with pytest.raises(SourceError, match="changed"):
        documents(tmp_path / "a.jsonl", first=35, before=(*batch[1:], len(batch.documents)))


def test_a_mended_line_lets_a_preparation_go_on(tmp_path):
    path, broken = tmp_path / "a.jsonl", '{"text": "broken"'
    lines = [json.dumps({"text": f"{i} " * 50}) for i in range(1000)]
    path.write_text("\n".join([*lines, broken, *lines[:10]]))
    options = {"vocab_size": 512, "shard_size": 5000, "show_progress": False}
    with pytest.raises(
        SourceError, match=r"line 1001: JSON that does not end on its line; mend it, or pass --skip_bad_rows 1"
    ):
        prepare([str(path)], tmp_path / "out", **options)
    kept = {shard: shard.stat().st_mtime_ns for shard in (tmp_path / "out").glob("*.npy")}
    assert len(kept) > 10
    path.write_text("\n".join([*lines, broken + "}", *lines[:10]]))
    prepare([str(path)], tmp_path / "out", **options)
    prepare([str(path)], tmp_path / "whole", **options)
    for file in (tmp_path / "whole").glob("*.npy"):
        assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes()
    assert {shard: shard.stat().st_mtime_ns for shard in kept} == kept


# ---------------------------------------------------------------- broken rows

KINDS = {
    '["text"]': "an array where an object with 'text' is due",
    '"text"': "a string where an object with 'text' is due",
    "3": "a number where an object with 'text' is due",
    "null": "null where an object with 'text' is due",
    "true": "a truth value where an object with 'text' is due",
    '{"text": "a"} {"text": "b"}': "two objects on one line",
    '{"text": "a"}, {"text": "b"}': "two objects on one line",
    '{"text": "a"} end': "an object and something after it",
    "{'text': 'a'}": "single quotes where JSON has double quotes",
    '{"title": "a", "body": "b"}': "no 'text' in the object, only title, body (--text_column names another)",
    '{"id": 3, "body": "b"}': "no 'text' in the object, only id, body (pass --text_column body)",
    "{}": "no 'text' in the object, only nothing",
    "<html>": "HTML or XML where a JSON object is due",
    "{": "JSON that is spread over several lines",
    '{"text": "a': "JSON that does not end on its line",
    '{"text": "a"': "JSON that does not end on its line",
    '{"text": "a",}': "no whole JSON object (",
    "text": "no whole JSON object (Expecting value at character 1)",
    '{"text": ' + "[" * 100_000: "JSON that is nested too deep",
}


@pytest.mark.parametrize("line", KINDS, ids=lambda line: line[:15])
def test_what_a_broken_line_holds_is_said(tmp_path, line):
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n\n' + line + '\n{"text": "two"}\n')
    with pytest.raises(SourceError) as error:
        documents(tmp_path / "a.jsonl")
    assert str(error.value).startswith(f"{tmp_path / 'a.jsonl'}, line 3: {KINDS[line]}")
    assert str(error.value).endswith("; mend it, or pass --skip_bad_rows 1 or more")


def test_a_line_that_is_not_utf8_names_the_byte(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "one"}\n{"text": "caf\xe9"}\n')
    with pytest.raises(SourceError, match=r"line 2: not UTF-8 \(byte 0xe9\); --encoding names another"):
        documents(tmp_path / "a.jsonl")
    assert documents(tmp_path / "a.jsonl", encoding="latin-1") == ["one", "café"]


def test_a_number_of_broken_rows_may_be_skipped(tmp_path, capsys):
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n[]\n{"text": "two"}\n{\n{"text": "three"}\n')
    (tmp_path / "b.csv").write_text('id,text\n1,four\n2,five,six\n"3"x,seven\n4,eight\n')
    paths = (tmp_path / "a.jsonl", tmp_path / "b.csv")
    found = documents(*paths, skip_bad_rows=4)
    assert [text for text in found if not isinstance(text, BadRow)] == ["one", "two", "three", "four", "eight"]
    assert [i for i, text in enumerate(found) if isinstance(text, BadRow)] == [1, 3, 6, 7]
    log = capsys.readouterr().err.splitlines()
    assert [line.partition(": ")[2].partition(":")[0] for line in log] == [
        f"{path}, line {number}" for path, number in zip([paths[0]] * 2 + [paths[1]] * 2, [2, 4, 3, 4], strict=True)
    ]
    with pytest.raises(SourceError, match=r"b\.csv, line 4: no CSV .* \(after 3 others\); mend it, or .* 4 or more"):
        documents(*paths, skip_bad_rows=3)
    with pytest.raises(SourceError, match=r"b\.csv, line 4"):  # two of them came before this run
        documents(*paths, first=4, bad_rows=2, skip_bad_rows=3)


def test_skipped_rows_are_counted_in_the_manifest_over_kills_too(tmp_path):
    lines = [json.dumps({"text": f"{i} " * 50}) for i in range(1000)]
    for place in (100, 500, 900):
        lines[place] = "{"
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    options = {"vocab_size": 512, "shard_size": 5000, "show_progress": False}
    with pytest.raises(SourceError, match="line 901"):
        prepare([str(tmp_path / "a.jsonl")], tmp_path / "out", options=ReadOptions(skip_bad_rows=2), **options)
    assert (tmp_path / "out" / "progress.json").exists()
    with pytest.raises(SourceError, match="line 901"):
        prepare([str(tmp_path / "a.jsonl")], tmp_path / "out", options=ReadOptions(skip_bad_rows=2), **options)
    manifest = prepare([str(tmp_path / "a.jsonl")], tmp_path / "out", options=ReadOptions(skip_bad_rows=3), **options)
    assert manifest["odd_documents"] == {"broken": 3}
    assert manifest["documents"] == 997


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ('[{"text": "one"}, {"text": }]', "element 2 of the array: not whole (Expecting value)"),
        ('[{"text": "one"} {"text": "two"}]', "element 2 of the array: not whole (Expecting ',' or ']')"),
        ('[{"text": "one"}, {"text": "tw', "element 2 of the array: not whole (Unterminated string starting at)"),
        ('[{"text": "one"}', "element 2 of the array: not whole (Expecting ',' or ']')"),
        ('[{"text": "one"}, "two"]', "element 2: a string where an object with 'text' is due"),
    ],
)
def test_a_broken_json_array_names_the_element(tmp_path, content, sentence):
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(SourceError) as error:
        documents(tmp_path / "a.json")
    assert str(error.value).startswith(f"{tmp_path / 'a.json'}, {sentence}")


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("id,text\n1,one\n2\n", ", line 3: 1 values where the first line has 2 names"),
        ('id,text\n1,one\n2,"two\n3,three\n', ", line 3: a quote opens and never closes"),
        ("id,body\n1,one\n", ": no column 'text', only id, body; name one with --text_column"),
        ("body\none\n", ": no column 'text', only body; pass --text_column body"),
        ("", ": no column 'text', only nothing"),
    ],
)
def test_a_broken_csv_file_names_the_line(tmp_path, content, sentence):
    (tmp_path / "a.csv").write_text(content)
    with pytest.raises(SourceError) as error:
        documents(tmp_path / "a.csv")
    assert str(error.value).startswith(f"{tmp_path / 'a.csv'}{sentence}")


# ---------------------------------------------------------------- columns

TEXT_COLUMNS = {
    "string": pyarrow.array(["one", None, "two"]),
    "large_string": pyarrow.array(["one", None, "two"], pyarrow.large_string()),
    "string_view": pyarrow.array(["one", None, "two"], pyarrow.string_view()),
    "dictionary": pyarrow.array(["one", None, "two"]).dictionary_encode(),
    "binary": pyarrow.array([b"one", None, b"two"]),
    "large_binary": pyarrow.array([b"one", None, b"two"], pyarrow.large_binary()),
}
OTHER_COLUMNS = {
    "int64": pyarrow.array([1, 2]),
    "double": pyarrow.array([1.5, 2.5]),
    "bool": pyarrow.array([True, False]),
    "list<": pyarrow.array([["one"], ["two"]]),
    "struct<": pyarrow.array([{"text": "one"}, {"text": "two"}]),
    "timestamp": pyarrow.array([1, 2], pyarrow.timestamp("s")),
}


@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
@pytest.mark.parametrize("kind", TEXT_COLUMNS)
def test_columns_that_are_text_by_nature_are_read(tmp_path, kind, suffix):
    write_column(tmp_path / f"a{suffix}", TEXT_COLUMNS[kind])
    assert documents(tmp_path / f"a{suffix}") == ["one", None, "two"]
    assert documents(tmp_path / f"a{suffix}", first=2) == ["two"]


def write_column(path, column):
    columns = pyarrow.table({"id": list(range(len(column))), "text": column, "title": ["a"] * len(column)})
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(columns, path)
    else:
        with pyarrow.ipc.new_file(path, columns.schema) as file:
            file.write_table(columns)


@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
@pytest.mark.parametrize("kind", OTHER_COLUMNS)
def test_other_columns_are_refused_before_the_first_shard(tmp_path, kind, suffix):
    as_json_lines(tmp_path / "a.jsonl", DOCUMENTS * 5)
    write_column(tmp_path / f"b{suffix}", OTHER_COLUMNS[kind])
    with pytest.raises(SourceError) as error:
        prepare(
            [str(tmp_path / "a.jsonl"), str(tmp_path / f"b{suffix}")],
            tmp_path / "out",
            vocab_size=512,
            shard_size=100,
            show_progress=False,
        )
    assert str(error.value).startswith(f"{tmp_path / f'b{suffix}'}: column 'text' holds {kind}")
    assert str(error.value).endswith("name another with --text_column (title)")
    assert not (tmp_path / "out").exists()


def test_bytes_that_are_no_text_are_refused(tmp_path):
    write_column(tmp_path / "a.parquet", pyarrow.array([b"one", b"\xff\xfe"]))
    with pytest.raises(SourceError, match=r"a\.parquet: cannot be read .*UTF8"):
        documents(tmp_path / "a.parquet")


def test_long_documents_make_short_batches(tmp_path):
    texts = ["short", "x" * 9_000_000, *["short"] * 300, "y" * 3_000_000, "z" * 3_000_000]
    for path, writer in ((tmp_path / "a.parquet", as_parquet), (tmp_path / "a.arrow", as_arrow_stream)):
        writer(path, texts)
        assert documents(path) == texts
        for batch in batches(path):
            size = sum(map(len, batch.documents if isinstance(batch.documents, list) else batch.documents.to_pylist()))
            assert size <= 10_000_000


# ---------------------------------------------------------------- encodings and plain text


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.json", "a.csv"])
def test_a_byte_order_mark_is_obeyed_and_left_out(tmp_path, name, encoding):
    texts = ["Zürich\n東京 🦙"] if name == "a.txt" else ["Zürich\n東京 🦙", "two", "three"]
    if name == "a.txt":
        (tmp_path / name).write_text(texts[0], encoding="utf-8")
    else:
        {**WRITERS, "a.json": as_json_array}[name](tmp_path / name, texts)
    text = (tmp_path / name).read_text(encoding="utf-8")
    (tmp_path / name).write_bytes(text.encode(encoding))
    assert documents(tmp_path / name) == texts
    if encoding == "utf-8-sig":
        assert documents(tmp_path / name, encoding="utf8") == texts


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("café".encode("latin-1"), "not utf-8 (byte 0xe9: "),
        ("中文".encode("gbk"), "not utf-8 (byte 0xd6: "),
        ("plain".encode("utf-16-le"), "holds NUL characters"),
        (bytes(range(1, 256)), "not utf-8 (byte 0x80: "),
        (b"\x00\x01\x02", "holds NUL characters"),
        (codecs.BOM_UTF16_LE + b"a", "not utf-16"),
    ],
)
def test_text_in_another_encoding_is_refused_and_the_flag_named(tmp_path, content, sentence):
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(SourceError) as error:
        documents(tmp_path / "a.txt")
    assert str(error.value).startswith(f"{tmp_path / 'a.txt'}: {sentence}")
    assert "pass --encoding" in str(error.value)


@pytest.mark.parametrize("encoding", ["latin-1", "gbk", "utf-16-le", "shift-jis"])
def test_a_named_encoding_is_used(tmp_path, encoding):
    text = "caf\xe9" if encoding == "latin-1" else "日本"
    (tmp_path / "a.txt").write_bytes(text.encode(encoding))
    assert documents(tmp_path / "a.txt", encoding=encoding) == [text]


@pytest.mark.parametrize("encoding", ["klingon", "base64", "rot13"])
def test_an_unknown_encoding_is_refused(encoding):
    with pytest.raises(ValueError, match=f"--encoding {encoding}: unknown"):
        ReadOptions(encoding=encoding)


@pytest.mark.parametrize("block", [1, 3, 2**20])
def test_a_separator_divides_a_text_file(tmp_path, monkeypatch, block):
    monkeypatch.setattr(rows, "BLOCK_BYTES", block)
    (tmp_path / "a.txt").write_text(
        "\none\n<|endoftext|>\n\n  two\nlines\n<|endoftext|><|endoftext|>\n \nthree<|endoftext|>\n"
    )
    assert documents(tmp_path / "a.txt", document_separator="<|endoftext|>") == ["one", "  two\nlines", " \nthree"]
    assert len(documents(tmp_path / "a.txt")) == 1
    assert documents(tmp_path / "a.txt", document_separator="<|endoftext|>", first=1) == ["  two\nlines", " \nthree"]


def test_an_empty_separator_is_refused():
    with pytest.raises(ValueError, match="--document_separator is empty"):
        ReadOptions(document_separator="")


def test_an_empty_file_is_an_empty_document_and_empty_json_has_none(tmp_path):
    for name, found in (("a.txt", [""]), ("a.jsonl", []), ("a.json", [])):
        Path(tmp_path / name).write_bytes(b"")
        assert documents(tmp_path / name) == found
    (tmp_path / "b.json").write_text(" [ ] ")
    assert documents(tmp_path / "b.json") == []


# ---------------------------------------------------------------- what a hostile reading found


def test_another_order_of_csv_columns_is_a_change(tmp_path, small_batches):
    rows = [f"text {i},title {i}" for i in range(60)]
    (tmp_path / "a.csv").write_text("\n".join(["text,title", *rows]))
    batch = batches(tmp_path / "a.csv")[3]
    (tmp_path / "a.csv").write_text("\n".join(["title,text", *rows]))
    with pytest.raises(SourceError, match="changed"):
        batches(tmp_path / "a.csv", first=21, before=(*batch[1:], 7))


@pytest.mark.parametrize("rest", ['\n[{"text": "second"}]', "garbage", "]"])
def test_what_follows_an_array_is_refused(tmp_path, rest):
    (tmp_path / "a.json").write_text('[{"text": "first"}] ' + rest)
    with pytest.raises(SourceError, match=r"a\.json: something follows the array"):
        documents(tmp_path / "a.json")


@pytest.mark.parametrize("suffix", [".parquet", ".arrow", ".csv"])
def test_two_columns_of_one_name_are_refused(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    columns = pyarrow.Table.from_arrays([pyarrow.array([1]), pyarrow.array(["one"])], names=["text", "text"])
    if suffix == ".csv":
        path.write_text("text,text\none,two\n")
    elif suffix == ".parquet":
        pyarrow.parquet.write_table(columns, path)
    else:
        with pyarrow.ipc.new_file(path, columns.schema) as file:
            file.write_table(columns)
    with pytest.raises(SourceError, match="has several columns 'text'"):
        documents(path)


def test_damaged_arrow_files_are_refused_and_end_no_process(tmp_path):
    draw, outcomes = random.Random(0), set()
    as_arrow_stream(tmp_path / "whole.arrow", DOCUMENTS[:7])
    whole = (tmp_path / "whole.arrow").read_bytes()
    for _ in range(300):
        damaged = bytearray(whole)
        for _ in range(4):
            damaged[draw.randrange(len(damaged))] = draw.randrange(256)
        (tmp_path / "a.arrow").write_bytes(damaged)
        try:
            documents(tmp_path / "a.arrow")
            outcomes.add("read")
        except SourceError as error:
            assert str(error).startswith(str(tmp_path / "a.arrow"))
            outcomes.add("refused")
    assert outcomes == {"read", "refused"}


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path, small_batches):
    as_json_lines(tmp_path / "a.jsonl", DOCUMENTS)
    batches_of_file = open_source([str(tmp_path / "a.jsonl")]).read()
    next(batches_of_file)
    with open(tmp_path / "a.jsonl", "a") as file:
        file.write('\n{"text": "one more"}')
    with pytest.raises(SourceError, match=r"a\.jsonl: changed while it was read; run this again"):
        list(batches_of_file)


@pytest.mark.skipif(os.name != "posix", reason="links and FIFOs")
def test_links_are_followed_once_and_odd_files_are_refused(tmp_path, capsys):
    (tmp_path / "real").mkdir()
    as_json_lines(tmp_path / "real" / "a.jsonl", ["one"])
    (tmp_path / "src").mkdir()
    as_json_lines(tmp_path / "src" / "b.jsonl", ["two"])
    (tmp_path / "src" / "linked").symlink_to(tmp_path / "real")
    (tmp_path / "src" / "loop").symlink_to(tmp_path / "src")
    assert sorted(documents(tmp_path / "src")) == ["one", "two"]
    assert sorted(documents(tmp_path / "src" / "**" / "*.jsonl")) == ["one", "two"]
    assert documents(tmp_path / "real", tmp_path / "real" / "a.jsonl") == ["one"]
    assert "named twice; each is read once" in capsys.readouterr().err
    (tmp_path / "src" / "broken.jsonl").symlink_to(tmp_path / "nothing")
    with pytest.raises(SourceError, match=r"broken\.jsonl: a broken link, or not a regular file"):
        documents(tmp_path / "src")
    (tmp_path / "src" / "broken.jsonl").unlink()
    os.mkfifo(tmp_path / "src" / "pipe.jsonl")
    with pytest.raises(SourceError, match=r"pipe\.jsonl: a broken link, or not a regular file"):
        documents(tmp_path / "src")


@pytest.mark.parametrize("word", ["", "~nobody-of-this-name/a.jsonl"])
def test_a_word_that_is_no_path_is_refused(word):
    with pytest.raises(SourceError):
        open_source([word])


def test_a_glob_may_begin_in_a_hidden_folder(tmp_path):
    (tmp_path / ".cache").mkdir()
    as_json_lines(tmp_path / ".cache" / "a.jsonl", ["one"])
    assert documents(tmp_path / ".cache" / "*.jsonl") == ["one"]


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("a.jsonl", b'{"text": "x", "n": ' + b"1" * 5000 + b"}", "line 1: a value that Python does not read"),
        ("a.jsonl", b'{"text": "one"}\n' + b"\0" * 20 + b"\n", "line 2: NUL characters"),
        ("a.jsonl", '{"text": "one"}'.encode("utf-16-le"), "holds NUL characters"),
        ("a.csv", "text\none".encode("utf-16-le"), "holds NUL characters"),
        ("a.csv", b"id;text\n1;one\n", "its values are separated by ';', not by commas"),
    ],
)
def test_odd_contents_are_named(tmp_path, name, content, sentence):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(SourceError) as error:
        documents(tmp_path / name)
    assert sentence in str(error.value)


def test_a_broken_line_after_a_byte_order_mark_can_be_skipped(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(codecs.BOM_UTF8 + b'{"text": "one"}\n{"text": "\xe9"}\n{"text": "two"}')
    found = documents(tmp_path / "a.jsonl", skip_bad_rows=1)
    assert [text for text in found if not isinstance(text, BadRow)] == ["one", "two"]
