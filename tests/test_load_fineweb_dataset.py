import gzip
import hashlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

import load_fineweb_dataset
import sources
from load_fineweb_dataset import SAMPLE_VOCAB_SIZE, prepare
from sources import SourceError
from tokenizer import Tokenizer

REPO = Path(__file__).resolve().parents[1]
VOCAB = 600  # 256 bytes, 88 merges and 256 control ids: a tokenizer of this size is built in milliseconds
TEXTS = [
    "The quick brown fox jumps over the lazy dog.\n",
    "Zürich, naïveté, Ελλάδα, Привет, 東京, 한국어, עברית, 🦙👩‍👩‍👧",
    "x",
    " \n\t ",
    "def f(a):\r\n    return a\x00b",
    "1234567 3.14159 don't WE'LL",
    "<|begin_of_text|>not a token<|end_of_text|><|eot_id|>",
    "long " * 300,
]


def ids_of(texts, vocab_size=VOCAB):
    """The ids that the shards must hold, from `encode`, a document at a time. `prepare` uses `encode_document`."""
    tokenizer = Tokenizer(vocab_size=vocab_size)
    return [i for text in texts for i in tokenizer.encode(text, bos=True, eos=True)]


def write_jsonl(path, documents):
    lines = "".join(json.dumps({"id": i, "text": document}) + "\n" for i, document in enumerate(documents)).encode()
    path.write_bytes(gzip.compress(lines) if path.suffix == ".gz" else lines)
    return path


def write_parquet(path, documents, column="text"):
    # The hub's files also have several row groups and other columns.
    table = pyarrow.table({"id": list(range(len(documents))), column: documents})
    pyarrow.parquet.write_table(table, path, row_group_size=3)
    return path


def write(path, documents):
    return write_parquet(path, documents) if path.suffix == ".parquet" else write_jsonl(path, documents)


def shard_ids(folder):
    """The ids of every shard, in the order of the manifest. The folder must hold nothing else."""
    manifest = json.loads((folder / "manifest.json").read_text())
    files = [shard["file"] for shard in manifest["shards"]]
    assert sorted(os.listdir(folder)) == sorted([*files, "manifest.json"])
    return [np.load(folder / file) for file in files]


def all_ids(folder):
    return np.concatenate(shard_ids(folder)).tolist()


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def run(source, out, **options):
    options = {"vocab_size": VOCAB, "shard_size": 100, "show_progress": False, **options}
    return prepare([str(path) for path in source], out, **options)


@pytest.fixture(autouse=True)
def no_syncs(monkeypatch):
    """test_files.py tests that files reach the disk. Here hundreds of syncs would only take time."""
    monkeypatch.setattr(os, "fsync", lambda fd: None)


@pytest.fixture
def small_batches(monkeypatch):
    """Give two documents at a time to the tokenizer. A real corpus gives two hundred."""
    monkeypatch.setattr(sources, "BATCH_DOCUMENTS", 2)


# ---------------------------------------------------------------- what the shards hold


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.parquet"])
def test_shards_hold_every_document_once_in_order_between_control_ids(tmp_path, small_batches, name):
    manifest = run([write(tmp_path / name, TEXTS)], tmp_path / "out")
    assert all_ids(tmp_path / "out") == ids_of(TEXTS)
    assert manifest["documents"] == len(TEXTS)
    assert manifest["odd_documents"] == {}


def test_a_text_file_is_one_document(tmp_path):
    (tmp_path / "a.txt").write_bytes("Zürich\n\n東京\n".encode())
    run([tmp_path / "a.txt"], tmp_path / "out")
    assert all_ids(tmp_path / "out") == ids_of(["Zürich\n\n東京\n"])


def test_several_files_are_read_in_the_order_in_which_they_are_named(tmp_path):
    (tmp_path / "c.txt").write_text("of the text file")
    paths = [
        write(tmp_path / "d.parquet", TEXTS[:2]),
        write(tmp_path / "b.jsonl.gz", TEXTS[2:4]),
        tmp_path / "c.txt",
        write(tmp_path / "a.jsonl", TEXTS[4:]),
    ]
    run(paths, tmp_path / "out")
    assert all_ids(tmp_path / "out") == ids_of([*TEXTS[:4], "of the text file", *TEXTS[4:]])


def test_a_file_of_more_documents_than_a_parquet_batch_or_a_chunk_is_read_whole(tmp_path):
    texts = [str(i) for i in range(10_050)]
    table = pyarrow.table({"text": texts})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=4_000)
    run([tmp_path / "a.parquet"], tmp_path / "out", shard_size=10_000)
    assert all_ids(tmp_path / "out") == ids_of(texts)


def test_blank_lines_are_no_documents_and_the_last_line_needs_no_line_end(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'\n{"text": "one"}\r\n  \n{"text": "two"}')
    manifest = run([tmp_path / "a.jsonl"], tmp_path / "out")
    assert all_ids(tmp_path / "out") == ids_of(["one", "two"])
    assert manifest["odd_documents"] == {}


def test_text_that_looks_like_control_tokens_stays_text(tmp_path):
    text = "<|begin_of_text|><|end_of_text|><|reserved_special_token_7|>"
    run([write(tmp_path / "a.jsonl", [text])], tmp_path / "out")
    ids = all_ids(tmp_path / "out")
    assert [i for i in ids if i >= VOCAB - 256] == [VOCAB - 256, VOCAB - 255]  # only begin and end
    assert Tokenizer(vocab_size=VOCAB).decode(ids[1:-1]) == text


def test_ids_of_the_whole_vocabulary_do_not_wrap_at_16_bits(tmp_path):
    texts = ["Сбер 한국어 東京 ประเทศไทย", "plain"]
    manifest = run([write(tmp_path / "a.jsonl", texts)], tmp_path / "out", vocab_size=128_256, shard_size=10)
    ids = all_ids(tmp_path / "out")
    assert ids == ids_of(texts, 128_256)
    assert [i for i in ids if 65_536 <= i < 128_000], "the text no longer has the large ids that this is about"
    assert manifest["dtype"] == "uint32"
    assert {shard.dtype.name for shard in shard_ids(tmp_path / "out")} == {"uint32"}


@pytest.mark.parametrize("shard_size", [1, 7, 10, 100, 10_000])
def test_every_shard_but_the_last_is_full_even_if_documents_are_longer(tmp_path, small_batches, shard_size):
    texts = ["a" * 23, "b" * 8, "c" * 63]  # 25, 10 and 65 tokens with their control ids: 100 in all
    run([write(tmp_path / "a.jsonl", texts)], tmp_path / "out", vocab_size=512, shard_size=shard_size)
    lengths = [len(shard) for shard in shard_ids(tmp_path / "out")]
    whole, rest = divmod(100, shard_size)
    assert lengths == [shard_size] * whole + [rest] * (rest > 0)
    assert all_ids(tmp_path / "out") == ids_of(texts, 512)


def test_without_a_shard_size_a_tenth_of_a_small_corpus_is_for_validation(tmp_path):
    run([write(tmp_path / "a.jsonl", TEXTS)], tmp_path / "out", shard_size=None)
    total = len(ids_of(TEXTS))
    assert [len(shard) for shard in shard_ids(tmp_path / "out")] == [total // 10, total - total // 10]
    assert all_ids(tmp_path / "out") == ids_of(TEXTS)


# ---------------------------------------------------------------- documents without text, and odd texts


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_documents_without_text_are_left_out_and_counted(tmp_path, small_batches, name):
    documents = ["one", "", None, "two", None, "", "three", None]
    manifest = run([write(tmp_path / name, documents)], tmp_path / "out")
    assert all_ids(tmp_path / "out") == ids_of(["one", "two", "three"])
    assert manifest["documents"] == 3
    assert manifest["odd_documents"] == {"empty": 2, "null": 3}


def test_values_that_are_no_strings_are_left_out_and_counted(tmp_path):
    manifest = run([write(tmp_path / "a.jsonl", [1, 2.5, True, ["a"], {"b": "c"}, "text"])], tmp_path / "out")
    assert all_ids(tmp_path / "out") == ids_of(["text"])
    assert manifest["odd_documents"] == {"not a string": 5}


def test_a_parquet_column_of_numbers_has_no_text(tmp_path):
    with pytest.raises(SourceError, match=r"a\.parquet: no document has any text"):
        run([write(tmp_path / "a.parquet", [1, 2, 3])], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_reading_goes_on_after_whole_batches_without_text(tmp_path, small_batches):
    manifest = run([write(tmp_path / "a.jsonl", ["one", *[""] * 10, "two"])], tmp_path / "out")
    assert all_ids(tmp_path / "out") == ids_of(["one", "two"])
    assert manifest["odd_documents"] == {"empty": 10}


def test_lone_surrogates_become_the_replacement_character(tmp_path):
    # json.loads accepts them. The web has them where a page was cut in the middle of an emoji.
    (tmp_path / "a.jsonl").write_bytes(rb'{"text": "x\ud800y"}' + b"\n" + rb'{"text": "\udc00"}' + b"\n")
    manifest = run([tmp_path / "a.jsonl"], tmp_path / "out")
    assert all_ids(tmp_path / "out") == ids_of(["x\ufffdy", "\ufffd"])
    assert manifest["documents"] == 2
    assert manifest["odd_documents"] == {"lone surrogates replaced": 2}


@pytest.mark.parametrize("character", ["a", " ", "\n", "東"])
def test_a_document_of_a_million_equal_characters_is_kept_whole_and_counted(tmp_path, character):
    texts = [character * 1_000_000, "and on"]
    manifest = run([write(tmp_path / "a.jsonl", texts)], tmp_path / "out", shard_size=400_000)
    assert manifest["odd_documents"] == {"too long for one piece": 1}
    ids = all_ids(tmp_path / "out")
    assert ids == ids_of(texts)
    end = ids.index(VOCAB - 255)
    assert Tokenizer(vocab_size=VOCAB).decode(ids[1:end]) == texts[0]


# ---------------------------------------------------------------- the same bytes from any number of processes

PREPARE_IN_PROCESSES = """
import multiprocessing, sys
import load_fineweb_dataset, sources

sources.BATCH_DOCUMENTS = 2  # many small tasks, which finish out of order

if __name__ == "__main__":
    source, out, method, *runs = sys.argv[1:]
    multiprocessing.set_start_method(method)
    for run in runs:
        num_proc, max_tokens = map(int, run.split("-"))
        load_fineweb_dataset.prepare(
            [source], f"{out}/{run}", vocab_size=600, shard_size=1000,
            max_tokens=max_tokens, num_proc=num_proc, show_progress=False,
        )
"""


def run_script(path, source, *args, **kwargs):
    """Run a script as the __main__ of a new process. The start methods forkserver and spawn import that file again."""
    path.write_text(source)
    env = {**os.environ, "PYTHONPATH": str(REPO)}
    # A run takes a second. The limit ends a run that hangs.
    command = [sys.executable, str(path), *map(str, args)]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=120, **kwargs)


@pytest.mark.skipif(os.name != "posix", reason="other systems have only spawn")
@pytest.mark.parametrize(
    ("method", "runs"),  # a run is "processes-max_tokens"
    [("fork", ["2-99999", "3-99999", "2-4000", "3-4000"]), ("forkserver", ["2-4000"]), ("spawn", ["3-99999"])],
)
def test_the_bytes_do_not_depend_on_the_number_of_processes(tmp_path, small_batches, method, runs):
    # Long and short documents alternate, so later tasks are done before earlier ones.
    source = write_jsonl(tmp_path / "a.jsonl", [f"{i} {text}" for i in range(12) for text in TEXTS] + [None])
    done = run_script(tmp_path / "script.py", PREPARE_IN_PROCESSES, source, tmp_path, method, *runs)
    assert done.returncode == 0, done.stderr
    for name in runs:
        max_tokens = int(name.split("-")[1])
        run([source], tmp_path / f"1-{max_tokens}", shard_size=1000, max_tokens=max_tokens)
        assert contents(tmp_path / name) == contents(tmp_path / f"1-{max_tokens}")


def test_the_bytes_do_not_depend_on_the_size_of_the_batches(tmp_path, monkeypatch):
    source = write_jsonl(tmp_path / "a.jsonl", TEXTS * 5)
    for documents in (1, 7, 200):
        monkeypatch.setattr(sources, "BATCH_DOCUMENTS", documents)
        run([source], tmp_path / str(documents), max_tokens=900)
    assert contents(tmp_path / "1") == contents(tmp_path / "7") == contents(tmp_path / "200")


WORKER_THAT_DIES = """
import os, signal, sys, time
import load_fineweb_dataset, sources
from tokenizer import Tokenizer

sources.BATCH_DOCUMENTS = 2
encode_document = Tokenizer.encode_document

def encode_or_die(self, text):
    if text == "out of memory":
        os.kill(os.getpid(), signal.SIGKILL)
    if text == "takes its time":
        time.sleep(1000)
    return encode_document(self, text)

Tokenizer.encode_document = encode_or_die  # in the workers too: they import this file

if __name__ == "__main__":
    sys.exit(load_fineweb_dataset.main())
"""


@pytest.mark.skipif(os.name != "posix", reason="no SIGKILL")
@pytest.mark.parametrize("others", [[], ["takes its time", ""]])  # the slow worker's batch comes before the dead one's
def test_when_a_worker_is_killed_the_run_ends_says_why_and_keeps_whole_shards(tmp_path, others):
    texts = [*TEXTS * 9, *others, "out of memory", *TEXTS * 19]
    source = write_jsonl(tmp_path / "a.jsonl", texts)
    args = ["--source", source, "--out_dir", tmp_path / "out", "--vocab_size", 600, "--shard_size", 100]
    began = time.monotonic()
    done = run_script(tmp_path / "script.py", WORKER_THAT_DIES, *args, "--num_proc", 2)
    assert time.monotonic() - began < 60  # it takes a second or two on an idle machine
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "a worker process died (signal 9)" in sentence(done.stderr)
    run([source], tmp_path / "out")
    assert all_ids(tmp_path / "out") == ids_of([text for text in texts if text])


WORKER_THAT_DIES_IDLE = """
import multiprocessing, os, signal, sys, time
from pathlib import Path
import load_fineweb_dataset, sources

def read_and_stall(self, first=0):
    yield ["one"]
    while not multiprocessing.active_children():
        time.sleep(0.1)
    os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
    time.sleep(1000)

sources.Sample.read = read_and_stall

if __name__ == "__main__":
    sys.exit(load_fineweb_dataset.main())
"""


@pytest.mark.skipif(os.name != "posix", reason="no SIGKILL")
def test_a_worker_killed_while_the_source_stalls_is_noticed(tmp_path):
    args = ["--source", "sample", "--out_dir", tmp_path / "out", "--vocab_size", 600, "--num_proc", 2]
    done = run_script(tmp_path / "script.py", WORKER_THAT_DIES_IDLE, *args)
    assert done.returncode == 1
    assert "a worker process died (signal 9)" in sentence(done.stderr)
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------- the manifest


def test_the_manifests_figures_equal_a_recount(tmp_path, small_batches):
    # With 512 ids every text token is one byte, so the test can count bytes without the tokenizer.
    texts = [*TEXTS, "", *TEXTS]
    source = write_jsonl(tmp_path / "a.jsonl", texts)
    manifest = run([source], tmp_path / "out", vocab_size=512)
    assert manifest == json.loads((tmp_path / "out" / "manifest.json").read_text())
    for index, (shard, ids) in enumerate(zip(manifest["shards"], shard_ids(tmp_path / "out"), strict=True)):
        assert shard == {
            "file": f"edufineweb_{'train' if index else 'val'}_{index:06d}.npy",
            "split": "train" if index else "val",
            "tokens": len(ids),
            "documents": ids.tolist().count(256),
            "text_bytes": sum(i < 256 for i in ids.tolist()),
            "sha256": hashlib.sha256((tmp_path / "out" / shard["file"]).read_bytes()).hexdigest(),
        }
        assert ids.dtype.name == manifest["dtype"] == "uint16"
    assert manifest["tokens"] == sum(len(text.encode()) + 2 for text in texts if text)
    assert manifest["documents"] == 2 * len(TEXTS)
    assert manifest["odd_documents"] == {"empty": 1}
    assert manifest["vocab_size"] == 512
    assert manifest["tokenizer_fingerprint"] == Tokenizer(vocab_size=512).fingerprint
    assert manifest["source"] == "a.jsonl"


def test_text_bytes_are_the_bytes_of_the_documents_with_any_vocabulary(tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    for vocab_size in (512, 600, 8192):
        manifest = run([source], tmp_path / str(vocab_size), vocab_size=vocab_size)
        text_bytes = sum(shard["text_bytes"] for shard in manifest["shards"])
        assert text_bytes == sum(len(text.encode()) for text in TEXTS)


@pytest.mark.parametrize(("max_tokens", "documents"), [(1, 1), (12, 1), (13, 2), (24, 2), (25, 3), (36, 3), (999, 6)])
def test_max_tokens_ends_after_the_document_that_reaches_it(tmp_path, small_batches, max_tokens, documents):
    texts = [letter * 10 for letter in "abcdef"]  # 12 tokens each
    source = write_jsonl(tmp_path / "a.jsonl", texts)
    manifest = run([source], tmp_path / "out", vocab_size=512, max_tokens=max_tokens)
    assert all_ids(tmp_path / "out") == ids_of(texts[:documents], 512)
    assert manifest["tokens"] == 12 * documents
    assert manifest["documents"] == documents


@pytest.mark.parametrize("documents_at_once", [1, 3, 200])
@pytest.mark.parametrize("max_tokens", [13, 20, 24])  # token 24 is the last of the second document
def test_documents_after_max_tokens_are_not_counted(tmp_path, monkeypatch, max_tokens, documents_at_once):
    monkeypatch.setattr(sources, "BATCH_DOCUMENTS", documents_at_once)
    source = write_jsonl(tmp_path / "a.jsonl", ["", "a" * 10, None, "b" * 10, "", None, "c" * 10])
    manifest = run([source], tmp_path / "out", vocab_size=512, max_tokens=max_tokens)
    assert manifest["documents"] == 2
    assert manifest["odd_documents"] == {"empty": 1, "null": 1}


# ---------------------------------------------------------------- a folder that exists


def test_running_again_changes_nothing(tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    first = run([source], tmp_path / "out")
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in (tmp_path / "out").iterdir()}
    assert run([source], tmp_path / "out") == first
    assert {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in (tmp_path / "out").iterdir()} == before


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        ({"vocab_size": 512}, "vocab_size 600 there, 512 asked"),
        ({"shard_size": 50}, "shard_size 100 there, 50 asked"),
        ({"max_tokens": 10}, "max_tokens None there, 10 asked"),
    ],
)
def test_another_recipe_on_a_finished_folder_is_refused(tmp_path, change, difference):
    source = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    run([source], tmp_path / "out")
    before = contents(tmp_path / "out")
    with pytest.raises(SourceError) as error:
        run([source], tmp_path / "out", **change)
    assert str(tmp_path / "out") in str(error.value)
    assert difference in str(error.value)
    assert "choose another --out_dir" in str(error.value)
    assert contents(tmp_path / "out") == before


def test_another_source_on_a_finished_folder_is_refused(tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    run([source], tmp_path / "out")
    before = contents(tmp_path / "out")
    with pytest.raises(SourceError, match=r"holds other data \(source a\.jsonl there, b\.jsonl asked\)"):
        run([write_jsonl(tmp_path / "b.jsonl", TEXTS)], tmp_path / "out")
    write_jsonl(source, TEXTS[::-1])  # the same name and size, another content
    with pytest.raises(SourceError, match=r"holds other data \(revision "):
        run([source], tmp_path / "out")
    assert contents(tmp_path / "out") == before


@pytest.mark.parametrize("garbage", ["{", "[]", ""])
def test_a_garbage_manifest_is_named(tmp_path, monkeypatch, capsys, garbage):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "manifest.json").write_text(garbage)
    status, error = refusal(monkeypatch, capsys, tmp_path, write_jsonl(tmp_path / "a.jsonl", TEXTS))
    assert status == 1
    assert "manifest.json" in error


def write_leftovers(folder, *indices):
    folder.mkdir()
    for index in indices:
        name = f"edufineweb_{'train' if index else 'val'}_{index:06d}.npy"
        np.save(folder / name, np.full(100, 7, dtype=np.uint16))


def test_shards_of_a_killed_run_are_cleared(tmp_path):
    write_leftovers(tmp_path / "out", 0, 1)
    (tmp_path / "out" / ".edufineweb_train_000002.npy.123.tmp").write_text("half")
    run([write_jsonl(tmp_path / "a.jsonl", TEXTS)], tmp_path / "out")
    assert all_ids(tmp_path / "out") == ids_of(TEXTS)


def test_shards_of_another_program_are_not_deleted(tmp_path):
    """The shards of build-nanogpt have the same names, and no manifest."""
    write_leftovers(tmp_path / "out", 0, 1, 2)
    before = contents(tmp_path / "out")
    with pytest.raises(SourceError, match=r"edufineweb_train_000002\.npy: not of this preparation; choose another"):
        run([write_jsonl(tmp_path / "a.jsonl", TEXTS)], tmp_path / "out")
    assert contents(tmp_path / "out") == before


# ---------------------------------------------------------------- killed, and started again

ODD_TEXTS = [*TEXTS[:3], "", *TEXTS[3:6], None, "", *TEXTS[:7], "long " * 90, "", "x", "", *TEXTS[:7], None]


class StopError(Exception):
    pass


def stop_after(monkeypatch, batches):
    """Let the source fail after this number of batches, as the hub may. None: it does not fail."""
    read = sources.Files.__dict__.get("whole_read") or sources.Files.read
    monkeypatch.setattr(sources.Files, "whole_read", read, raising=False)

    def read_some(self, first=0):
        for number, batch in enumerate(read(self, first)):
            if number == batches:
                raise StopError
            yield batch

    monkeypatch.setattr(sources.Files, "read", read_some)


@pytest.mark.parametrize("max_tokens", [None, 700])
@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
@pytest.mark.parametrize("shard_size", [25, 60, 100])
def test_a_run_stopped_anywhere_and_resumed_writes_the_same_bytes(
    tmp_path, monkeypatch, small_batches, shard_size, name, max_tokens
):
    source, options = write(tmp_path / name, ODD_TEXTS), {"shard_size": shard_size, "max_tokens": max_tokens}
    run([source], tmp_path / "whole", **options)
    for batches in (3, 4, 9):  # each run stops after this many batches, until the folder is done
        out, stops = tmp_path / str(batches), 0
        stop_after(monkeypatch, batches)
        while not (out / "manifest.json").exists():
            progress = out / "progress.json"
            before = progress.exists() and progress.read_text()
            try:
                run([source], out, **options)
            except StopError:
                stops += 1
            if (progress.exists() and progress.read_text()) == before:
                stop_after(monkeypatch, None)  # no shard ended in so few batches: every next run would stop here too
        assert stops
        assert contents(out) == contents(tmp_path / "whole")
        stop_after(monkeypatch, None)


def test_whole_shards_are_not_tokenized_again(tmp_path, monkeypatch, small_batches):
    source = write_jsonl(tmp_path / "a.jsonl", texts := [letter * 23 for letter in "abcdefghij"])  # 25 tokens each
    stop_after(monkeypatch, 4)
    with pytest.raises(StopError):
        run([source], tmp_path / "out", vocab_size=512, shard_size=60)
    assert len(list((tmp_path / "out").glob("*.npy"))) == 3  # 180 of the 200 tokens that were read
    stop_after(monkeypatch, None)
    encoded, encode = [], Tokenizer.encode_document
    monkeypatch.setattr(Tokenizer, "encode_document", lambda self, text: encoded.append(text) or encode(self, text))
    run([source], tmp_path / "out", vocab_size=512, shard_size=60)
    assert encoded == texts[7:]  # token 180 is in the eighth text
    assert all_ids(tmp_path / "out") == ids_of(texts, 512)


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        ({"vocab_size": 512}, "vocab_size 600 there, 512 asked"),
        ({"shard_size": 50}, "shard_size 100 there, 50 asked"),
        ({"max_tokens": 10}, "max_tokens None there, 10 asked"),
    ],
)
def test_another_recipe_on_an_unfinished_folder_is_refused(tmp_path, monkeypatch, small_batches, change, difference):
    source = write_jsonl(tmp_path / "a.jsonl", TEXTS * 5)
    stop_after(monkeypatch, 5)
    with pytest.raises(StopError):
        run([source], tmp_path / "out")
    before = contents(tmp_path / "out")
    assert "progress.json" in before
    with pytest.raises(SourceError) as error:
        run([source], tmp_path / "out", **change)
    assert difference in str(error.value)
    write_jsonl(source, TEXTS)
    with pytest.raises(SourceError, match="revision"):
        run([source], tmp_path / "out")
    assert contents(tmp_path / "out") == before


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: os.truncate(path, 130), lambda path: path.write_text("")])
def test_a_shard_lost_or_cut_short_between_two_runs_is_named(tmp_path, monkeypatch, small_batches, damage):
    source = write_jsonl(tmp_path / "a.jsonl", TEXTS * 5)
    stop_after(monkeypatch, 5)
    with pytest.raises(StopError):
        run([source], tmp_path / "out")
    damage(tmp_path / "out" / "edufineweb_train_000001.npy")
    with pytest.raises(SourceError, match=r"edufineweb_train_000001\.npy: missing or cut short"):
        run([source], tmp_path / "out")


def test_a_second_run_in_the_same_folder_is_refused(tmp_path, monkeypatch):
    source, refused = write_jsonl(tmp_path / "a.jsonl", TEXTS), []
    read = sources.Files.read

    def read_and_run_again(self, first=0):
        monkeypatch.setattr(sources.Files, "read", read)
        with pytest.raises(SourceError, match="another run is preparing it"):
            run([source], tmp_path / "out")
        refused.append(True)
        yield from read(self, first)

    monkeypatch.setattr(sources.Files, "read", read_and_run_again)
    run([source], tmp_path / "out")
    assert refused
    assert all_ids(tmp_path / "out") == ids_of(TEXTS)


KILLED_AT_A_CALL = """
import os, signal, sys
import load_fineweb_dataset, sources

sources.BATCH_DOCUMENTS = 2
calls = 0

def dying(call):
    def count_and_call(*args, **kwargs):
        global calls
        calls += 1
        if calls == int(sys.argv[3]):
            os.kill(os.getpid(), signal.SIGKILL)
        return call(*args, **kwargs)
    return count_and_call

os.fsync, os.replace = dying(lambda fd: None), dying(os.replace)
load_fineweb_dataset.prepare([sys.argv[1]], sys.argv[2], vocab_size=600, shard_size=400, show_progress=False)
"""


@pytest.mark.skipif(os.name != "posix", reason="no SIGKILL")
def test_the_run_after_a_kill_at_any_step_of_writing_makes_the_same_folder(tmp_path):
    # A file takes three calls: sync it, rename it, sync the folder. A shard needs two files: its own and progress.json.
    source = write_jsonl(tmp_path / "a.jsonl", ODD_TEXTS)
    run([source], tmp_path / "whole", shard_size=400)
    call, killed = 1, True
    while killed:
        out = tmp_path / str(call)
        done = run_script(tmp_path / "script.py", KILLED_AT_A_CALL, source, out, call)
        killed = done.returncode == -signal.SIGKILL
        assert killed or (done.returncode == 0 and call > 12), done.stderr
        run([source], out, shard_size=400)
        # A kill after the manifest leaves two small files that nothing reads.
        left = {name: body for name, body in contents(out).items() if name not in (".lock", "progress.json")}
        assert left == contents(tmp_path / "whole")
        call += 1


def kill_and_resume(tmp_path, kills):
    """Prepare a corpus in two processes. `kills` times, SIGKILL it or a worker at a random moment and start it again.

    Returns the number of kills, the number of resumes after whole shards, the folder's true sha256, and every sha256
    that a finished folder had.
    """
    text = Path(load_fineweb_dataset.__file__).read_text()
    source = write_jsonl(tmp_path / "a.jsonl", [f"{i} {text}" for i in range(2000)])
    options = {"vocab_size": 512, "shard_size": 300_000}
    run([source], tmp_path / "whole", **options)
    digest = folder_digest(tmp_path / "whole")
    command = [sys.executable, REPO / "load_fineweb_dataset.py", "--source", source, "--out_dir", tmp_path / "out"]
    command += [str(word) for name, value in options.items() for word in (f"--{name}", value)] + ["--num_proc", "2"]
    progress = tmp_path / "out" / "progress.json"
    rng, digests, done, resumed = random.Random(0), [], 0, 0
    while True:
        resumed += progress.exists()
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        if done < kills:
            while not progress.exists() and process.poll() is None:
                time.sleep(0.01)
            time.sleep(rng.uniform(0, 1.5))
            victim = rng.choice([process.pid, *worker_pids(process.pid)])
            if process.poll() is None:
                os.kill(victim, signal.SIGKILL)
                done += 1
        err = process.communicate(timeout=60)[1]
        assert process.returncode in (0, 1, -signal.SIGKILL), err
        assert process.returncode != 1 or "a worker process died (signal 9)" in err, err
        if process.returncode == 0:
            digests.append(folder_digest(tmp_path / "out"))
            shutil.rmtree(tmp_path / "out")
            if done == kills:
                return done, resumed, digest, digests


def worker_pids(pid):
    """Linux's list of the processes that `pid` started, without multiprocessing's resource tracker."""
    children = Path(f"/proc/{pid}/task/{pid}/children")
    pids = children.read_text().split() if children.exists() else []
    return [int(pid) for pid in pids if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]


def running(pid):
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"


def folder_digest(folder):
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        digest.update(path.name.encode() + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="finds the workers in /proc")
@pytest.mark.parametrize("kills", [3, pytest.param(50, marks=pytest.mark.slow)])
def test_a_run_killed_at_random_moments_and_resumed_makes_the_same_folder(tmp_path, kills, capsys):
    done, resumed, digest, digests = kill_and_resume(tmp_path, kills)
    assert done == kills
    assert set(digests) == {digest}
    with capsys.disabled():
        print(f" {done} kills, {resumed} resumes after whole shards, {len(digests)} whole folders, sha256 {digest} ")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="finds the workers in /proc")
def test_workers_end_with_a_killed_parent(tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl", ["text " * 20_000] * 500)
    command = [sys.executable, REPO / "load_fineweb_dataset.py", "--source", source, "--out_dir", tmp_path / "out"]
    process = subprocess.Popen([*command, "--vocab_size", "512", "--num_proc", "2"], stderr=subprocess.DEVNULL)
    while len(workers := worker_pids(process.pid)) < 2:
        time.sleep(0.01)
    process.kill()
    process.wait()
    while any(Path(f"/proc/{pid}").exists() and running(pid) for pid in workers):
        time.sleep(0.01)  # for ever, if a worker stays: then the time limit of the test command ends it


def test_the_users_own_files_in_the_folder_survive_a_failure(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{\n')
    with pytest.raises(SourceError):
        run([tmp_path / "a.jsonl"], tmp_path / "out")
    assert contents(tmp_path / "out") == {"notes.txt": b"mine"}


# ---------------------------------------------------------------- the sample


@pytest.fixture(scope="module")
def sample(tmp_path_factory):
    """The whole sample corpus, prepared with every connection forbidden."""

    def refuse(*args):
        raise AssertionError("the sample needs no network")

    folder = tmp_path_factory.mktemp("sample") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", refuse)
        patch.setattr(socket, "getaddrinfo", refuse)
        prepare(["sample"], folder, vocab_size=SAMPLE_VOCAB_SIZE, show_progress=False)
    return folder


def test_the_sample_is_a_corpus_to_train_on(sample):
    lengths = [len(shard) for shard in shard_ids(sample)]
    assert lengths[:-1] == [2**17] * (len(lengths) - 1)
    assert sum(lengths) > 10 * 2**17


def test_the_samples_held_out_documents_are_not_trained_on(sample):
    shards = shard_ids(sample)
    documents = np.split(np.concatenate(shards), np.flatnonzero(np.concatenate(shards) == SAMPLE_VOCAB_SIZE - 256)[1:])
    position, held_out, trained_on = 0, set(), set()
    for ids in documents:
        if position + len(ids) <= len(shards[0]):
            held_out.add(ids.tobytes())
        elif position >= len(shards[0]):  # a document across the border is in neither set
            trained_on.add(ids.tobytes())
        position += len(ids)
    assert len(held_out) > 5 and len(trained_on) > 100
    assert not held_out & trained_on


def test_the_command_writes_the_same_sample_in_another_process(sample, tmp_path):
    command = [sys.executable, REPO / "load_fineweb_dataset.py", "--source", "sample", "--max_tokens", "300_000"]
    env = {**os.environ, "PYTHONHASHSEED": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "data" / "sample"  # where train.py looks for it
    assert done.stdout.startswith("data/sample: ")
    assert f"({2**17:,} for validation)" in done.stdout
    begin = all_ids(folder)
    assert begin == all_ids(sample)[: len(begin)]
    for name in ("edufineweb_val_000000.npy", "edufineweb_train_000001.npy"):
        assert (folder / name).read_bytes() == (sample / name).read_bytes()


# ---------------------------------------------------------------- the command line


def main(monkeypatch, *args):
    monkeypatch.setattr(sys, "argv", ["load_fineweb_dataset.py", *map(str, args)])
    return load_fineweb_dataset.main()


def sentence(stderr):
    """The one line of an error message, without the progress bar before it."""
    lines = [line for line in stderr.splitlines() if line.strip() and "token/s" not in line]
    assert len(lines) == 1, stderr
    assert lines[0].startswith("load_fineweb_dataset.py: ")
    return lines[0]


def refusal(monkeypatch, capsys, tmp_path, *sources, shard_size=100):
    args = ("--out_dir", tmp_path / "out", "--vocab_size", 600, "--shard_size", shard_size, "--num_proc", 1)
    status = main(monkeypatch, "--source", *sources, *args)
    captured = capsys.readouterr()
    assert captured.out == ""
    return status, sentence(captured.err)


def test_success_is_one_line_of_figures_and_status_0(tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    source = write_jsonl(tmp_path / "a.jsonl", ["a" * 198, "", "b" * 98])
    args = ("--source", source, "--out_dir", out, "--vocab_size", 512, "--shard_size", 100, "--num_proc", 1)
    figures = "2 documents (1 without text left out), 300 tokens in 3 shards (100 for validation), 0.99 bytes a token"
    assert main(monkeypatch, *args) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"{out}: {figures}")
    assert main(monkeypatch, *args) == 0  # the second time it does nothing
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"{out}: already prepared, {figures}")


def test_a_corpus_without_training_data_gets_a_warning(tmp_path, monkeypatch, capsys):
    source = write_jsonl(tmp_path / "a.jsonl", ["few"])
    args = ("--vocab_size", 512, "--shard_size", 100, "--num_proc", 1)
    assert main(monkeypatch, "--source", source, "--out_dir", tmp_path / "out", *args) == 0
    assert "smaller --shard_size" in capsys.readouterr().err


def bad_line(path):
    path.write_text('{"text": "one"}\n\n{"text": "two"\n{"text": "three"}\n')


def no_text_field(path):
    path.write_text('{"text": "one"}\n{"text": "two"}\n{"body": "three"}\n')


def no_object(path):
    path.write_text('{"text": "one"}\n{"text": "two"}\n["three"]\n')


def not_utf8(path):
    path.write_bytes(b'{"text": "one"}\n{"text": "two"}\n{"text": "\xff\xfe"}\n')


def nested_too_deep(path):  # json.loads gives up with a RecursionError
    path.write_text('{"text": "one"}\n{"text": "two"}\n{"text": ' + "[" * 100_000 + "\n")


def a_page_of_html(path):
    path.write_text("<html>\n<body>404</body>\n</html>\n")


def bad_line_in_gz(path):
    path.write_bytes(gzip.compress(b'{"text": "one"}\n{"text": "two"}\n{"text": 3\n'))


@pytest.mark.parametrize(
    ("name", "damage", "line"),
    [
        ("a.jsonl", bad_line, 3),
        ("a.jsonl", no_text_field, 3),
        ("a.jsonl", no_object, 3),
        ("a.jsonl", not_utf8, 3),
        ("a.jsonl", nested_too_deep, 3),
        ("a.jsonl", a_page_of_html, 1),
        ("a.jsonl.gz", bad_line_in_gz, 3),
    ],
)
def test_a_bad_line_is_named(tmp_path, monkeypatch, capsys, name, damage, line):
    damage(tmp_path / name)
    status, error = refusal(monkeypatch, capsys, tmp_path, tmp_path / name)
    assert status == 1
    assert f"{tmp_path / name}, line {line}: " in error
    assert error.endswith("mend the line")
    assert not (tmp_path / "out").exists()


def truncated(path):
    write(path, [f"{i} {text}" for i in range(200) for text in TEXTS])
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])


def empty(path):
    path.write_bytes(b"")


def another_format(path):
    path.write_bytes(b"These bytes are neither of a parquet file nor of gzip." * 10)


def damaged_inside(path):  # gzip: a block of a type that does not exist; parquet: pages overwritten
    write(path, [f"{i} {text}" for i in range(200) for text in TEXTS])
    content = bytearray(path.read_bytes())
    start, length = (10, 20) if path.suffix == ".gz" else (len(content) // 2, 200)
    content[start : start + length] = b"\xff" * length
    path.write_bytes(content)


def not_utf8_in_a_whole_file(path):
    binary = pyarrow.array([b"fine", b"\xff\xfe"])
    text = pyarrow.Array.from_buffers(pyarrow.string(), 2, binary.buffers())
    pyarrow.parquet.write_table(pyarrow.table({"text": text}), path)


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("a.parquet", truncated),
        ("a.parquet", empty),
        ("a.parquet", another_format),
        ("a.parquet", damaged_inside),
        ("a.parquet", not_utf8_in_a_whole_file),
        ("a.jsonl.gz", truncated),
        ("a.jsonl.gz", another_format),
        ("a.jsonl.gz", damaged_inside),
    ],
)
def test_a_damaged_file_is_named(tmp_path, monkeypatch, capsys, name, damage):
    damage(tmp_path / name)
    status, error = refusal(monkeypatch, capsys, tmp_path, tmp_path / name, shard_size=1_000_000)
    assert status == 1
    assert f"{name}: " in error and error.endswith("replace the file")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("num_proc", [1, 2])
def test_bytes_that_are_no_utf8_end_the_run_with_any_number_of_processes(tmp_path, num_proc):
    not_utf8_in_a_whole_file(tmp_path / "a.parquet")
    with pytest.raises(SourceError, match=r"a\.parquet: not UTF-8 \(invalid start byte\); replace the file"):
        run([tmp_path / "a.parquet"], tmp_path / "out", num_proc=num_proc)


def test_a_missing_column_is_named_with_the_columns_that_are_there(tmp_path, monkeypatch, capsys):
    path = write_parquet(tmp_path / "a.parquet", TEXTS, column="body")
    status, error = refusal(monkeypatch, capsys, tmp_path, path)
    assert status == 1
    assert f"{path}: no column 'text', only id, body" in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["a.csv", "a.json", "a.gz", "sample", "fineweb"])
def test_an_unknown_format_is_refused_and_the_known_formats_are_named(tmp_path, monkeypatch, capsys, name):
    (tmp_path / name).write_text("text")
    good = write_jsonl(tmp_path / "good.jsonl", TEXTS)
    status, error = refusal(monkeypatch, capsys, tmp_path, good, tmp_path / name)
    assert status == 1
    assert str(tmp_path / name) in error and ".jsonl.gz, .parquet, .txt" in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["missing.jsonl", "missing.txt", "folder.txt"])
def test_a_missing_file_is_named(tmp_path, monkeypatch, capsys, name):
    (tmp_path / "folder.txt").mkdir()
    status, error = refusal(monkeypatch, capsys, tmp_path, tmp_path / name)
    assert status == 1
    assert f"{tmp_path / name}: no such file" in error
    assert not (tmp_path / "out").exists()


def test_whole_shards_before_a_bad_line_stay(tmp_path, monkeypatch, capsys, small_batches):
    lines = [json.dumps({"text": text}) for text in TEXTS * 10]
    (tmp_path / "a.jsonl").write_text("\n".join([*lines, "{"]))
    status, error = refusal(monkeypatch, capsys, tmp_path, tmp_path / "a.jsonl")
    assert status == 1 and "line 81" in error
    shards = [np.load(path) for path in sorted((tmp_path / "out").glob("*.npy"), key=lambda path: path.name[-10:])]
    assert len(shards) > 10
    ids = np.concatenate(shards).tolist()
    assert ids == ids_of(TEXTS * 10)[: len(ids)]
    assert len(os.listdir(tmp_path / "out")) == len(shards) + 1  # and progress.json


def test_ctrl_c_keeps_whole_shards(tmp_path, monkeypatch, capsys, small_batches):
    read = sources.Files.read

    def interrupted(self, first=0):
        for number, batch in enumerate(read(self, first)):
            if number == 20:
                raise KeyboardInterrupt
            yield batch

    monkeypatch.setattr(sources.Files, "read", interrupted)
    source = write_jsonl(tmp_path / "a.jsonl", TEXTS * 10)
    status, error = refusal(monkeypatch, capsys, tmp_path, source)
    assert status == 130
    assert error.endswith("stopped; the same command goes on after the last whole shard")
    assert (tmp_path / "out" / "progress.json").exists()
    monkeypatch.setattr(sources.Files, "read", read)
    run([source], tmp_path / "out")
    assert all_ids(tmp_path / "out") == ids_of(TEXTS * 10)


CTRL_C = """
import multiprocessing, os, signal, sys, time
import load_fineweb_dataset, sources

sources.BATCH_DOCUMENTS = 2
read = sources.Files.read

def read_until_interrupted(self, first=0):
    for number, batch in enumerate(read(self, first)):
        if number == 20:
            time.sleep(2)  # until the workers have started, or nearly so
            os.killpg(0, signal.SIGINT)  # as a terminal does: the workers get it too
            time.sleep(1000)
        yield batch

sources.Files.read = read_until_interrupted

if __name__ == "__main__":
    sys.exit(load_fineweb_dataset.main())
"""


@pytest.mark.skipif(os.name != "posix", reason="no process groups")
def test_ctrl_c_reaches_the_workers_without_a_traceback(tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl", TEXTS * 10)
    args = ["--source", source, "--out_dir", "out", "--vocab_size", 600, "--shard_size", 10_000, "--num_proc", 2]
    done = run_script(tmp_path / "script.py", CTRL_C, *args, cwd=tmp_path, start_new_session=True)
    assert done.returncode == 130
    assert "stopped" in sentence(done.stderr)
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="finds the workers in /proc")
@pytest.mark.parametrize("seconds", [0.05, 0.1, 0.3])
def test_ctrl_c_while_the_workers_start_shows_no_traceback(tmp_path, seconds):
    source = write_jsonl(tmp_path / "a.jsonl", ["text " * 20_000] * 500)
    command = [sys.executable, REPO / "load_fineweb_dataset.py", "--source", source, "--out_dir", tmp_path / "out"]
    process = subprocess.Popen([*command, "--num_proc", "2"], stderr=subprocess.PIPE, text=True, start_new_session=True)
    while len(worker_pids(process.pid)) < 2:
        time.sleep(0.01)
    time.sleep(seconds)
    while process.poll() is None:  # on a busy machine it may not yet handle the signal
        os.killpg(process.pid, signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=5)
    assert process.returncode == 130
    assert "stopped" in sentence(process.stderr.read())


@pytest.mark.parametrize("vocab_size", [1, 511, 128_257])
def test_an_impossible_vocabulary_size_is_refused_before_anything_is_written(tmp_path, monkeypatch, capsys, vocab_size):
    source = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    assert main(monkeypatch, "--source", source, "--out_dir", tmp_path / "out", "--vocab_size", vocab_size) == 1
    assert f"vocab_size={vocab_size}" in sentence(capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("flag", ["--shard_size", "--max_tokens", "--num_proc"])
@pytest.mark.parametrize("value", ["0", "-1"])
def test_a_number_below_1_is_refused(tmp_path, monkeypatch, capsys, flag, value):
    with pytest.raises(SystemExit):
        main(monkeypatch, "--source", "sample", "--out_dir", tmp_path / "out", flag, value)
    assert f"{flag} {value}: must be at least 1" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_missing_network_gives_one_sentence_and_no_folder(tmp_path):
    command = [sys.executable, REPO / "load_fineweb_dataset.py", "--out_dir", tmp_path / "out"]
    env = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
    # Nobody listens on port 9 of this machine. So the test stays here even if there is a network.
    env |= {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path / "hf"), "NO_PROXY": "*"}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert "http://127.0.0.1:9: could not read HuggingFaceFW/fineweb-edu" in sentence(done.stderr)
    assert not (tmp_path / "out").exists()


def test_importing_the_module_does_no_work(tmp_path):
    script = (
        "import sys\n"
        "import load_fineweb_dataset\n"
        "print(sorted({'torch', 'pyarrow', 'huggingface_hub', 'requests'} & set(sys.modules)))\n"
    )
    done = run_script(tmp_path / "script.py", script, cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "[]\n", "")
    assert os.listdir(tmp_path) == ["script.py"]
