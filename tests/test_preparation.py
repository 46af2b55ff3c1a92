import errno
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
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

import readers
import sources
from load_fineweb_dataset import SAMPLE_VOCAB_SIZE
from preparation import prepare
from rows import SourceError
from shards import ValidationShard
from tokenizer import Tokenizer

pytestmark = pytest.mark.usefixtures("no_syncs")

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
    """The ids of every shard with ids, in the order of the manifest. The folder must hold nothing else."""
    manifest = json.loads((folder / "manifest.json").read_text())
    files = [shard["file"] for shard in manifest["shards"]]
    assert sorted(os.listdir(folder)) == sorted([*files, "manifest.json"])
    return [ids for ids in (np.load(folder / file) for file in files) if len(ids)]


def all_ids(folder):
    return np.concatenate(shard_ids(folder)).tolist()


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def run(source, out, **options):
    options = {"vocab_size": VOCAB, "shard_size": 100, "val_fraction": 0, "show_progress": False, **options}
    return prepare([str(path) for path in source], out, **options)


def sentence(stderr):
    """The one line of an error message, without the progress bar before it."""
    lines = [line for line in stderr.splitlines() if line.strip() and "token/s" not in line]
    assert len(lines) == 1, stderr
    assert lines[0].startswith("load_fineweb_dataset.py: ")
    return lines[0]


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
import load_fineweb_dataset, readers, sources

readers.BATCH_DOCUMENTS = 2  # many small tasks, which finish out of order

if __name__ == "__main__":
    source, out, method, *runs = sys.argv[1:]
    multiprocessing.set_start_method(method)
    for run in runs:
        num_proc, max_tokens = map(int, run.split("-"))
        load_fineweb_dataset.prepare(
            [source], f"{out}/{run}", vocab_size=600, shard_size=1000,
            max_tokens=max_tokens, num_proc=num_proc, val_fraction=0.1, show_progress=False,
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
        run([source], tmp_path / f"1-{max_tokens}", shard_size=1000, max_tokens=max_tokens, val_fraction=0.1)
        assert contents(tmp_path / name) == contents(tmp_path / f"1-{max_tokens}")


def test_the_bytes_do_not_depend_on_the_size_of_the_batches(tmp_path, monkeypatch):
    source = write_jsonl(tmp_path / "a.jsonl", TEXTS * 5)
    for documents in (1, 7, 200):
        monkeypatch.setattr(readers, "BATCH_DOCUMENTS", documents)
        run([source], tmp_path / str(documents), max_tokens=900)
    assert contents(tmp_path / "1") == contents(tmp_path / "7") == contents(tmp_path / "200")


WORKER_THAT_DIES = """
import os, signal, sys, time
import load_fineweb_dataset, readers, sources
from tokenizer import Tokenizer

readers.BATCH_DOCUMENTS = 2
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
    args += ["--val_fraction", 0]
    began = time.monotonic()
    done = run_script(tmp_path / "script.py", WORKER_THAT_DIES, *args, "--num_proc", 2)
    assert time.monotonic() - began < 60  # it takes a second or two on an idle machine
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "a worker process died (signal 9)" in sentence(done.stderr)
    run([source], tmp_path / "out")
    assert all_ids(tmp_path / "out") == ids_of([text for text in texts if text])


WORKER_THAT_CANNOT_START = """
import multiprocessing, sys
import load_fineweb_dataset

if multiprocessing.current_process().name != "MainProcess":  # a worker, which imports this file
    sys.exit("no room for this worker")

if __name__ == "__main__":
    sys.exit(load_fineweb_dataset.main())
"""


def test_a_worker_that_cannot_start_is_not_called_out_of_memory(tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    args = ["--source", source, "--out_dir", tmp_path / "out", "--vocab_size", 600, "--num_proc", 2]
    done = run_script(tmp_path / "script.py", WORKER_THAT_CANNOT_START, *args)
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert "a worker process could not start (exit status 1; its error is above)" in last
    assert "--num_proc 1" in last and "if memory ran out" not in last
    assert not (tmp_path / "out").exists()


WORKER_THAT_DIES_IDLE = """
import multiprocessing, os, signal, sys, time
from pathlib import Path
import load_fineweb_dataset, readers, sources

def read_and_stall(self, reader):
    yield readers.Batch(["one"], "", "")
    while not multiprocessing.active_children():
        time.sleep(0.1)
    os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
    time.sleep(1000)

sources.Sample.batches = read_and_stall

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


# ---------------------------------------------------------------- the held-out part


def both_parts(folder, vocab_size=VOCAB):
    """The texts of the validation shard and of the training shards."""
    tokenizer, parts = Tokenizer(vocab_size=vocab_size), {"val": [], "train": []}
    for shard in json.loads((folder / "manifest.json").read_text())["shards"]:
        parts[shard["split"]] += np.load(folder / shard["file"]).tolist()
    texts = {}
    for split, ids in parts.items():
        assert not ids or (ids[0], ids[-1]) == (tokenizer.bos_id, tokenizer.eos_id)  # no document is cut
        ends = [i for i, token in enumerate(ids) if token == tokenizer.eos_id]
        begins = [0, *[end + 1 for end in ends]]
        texts[split] = [tokenizer.decode(ids[b + 1 : e]) for b, e in zip(begins, ends, strict=False)]
    return texts["val"], texts["train"]


PAGES = [f"Page {i} " + "word " * (i % 7) for i in range(500)]


def test_a_hash_of_the_text_chooses_what_is_held_out(tmp_path):
    run([write_jsonl(tmp_path / "a.jsonl", PAGES)], tmp_path / "a", shard_size=3000, val_fraction=0.1)
    val, train = both_parts(tmp_path / "a")
    limit = 2**64 // 10
    assert val == [text for text in PAGES if int(hashlib.sha256(text.encode()).hexdigest()[:16], 16) < limit]
    assert train == [text for text in PAGES if text not in val]
    assert 30 < len(val) < 70
    # The same documents for any order, vocabulary, shard size, number of processes and a lone duplicate.
    order = [*PAGES, *PAGES[:100]]
    random.Random(0).shuffle(order)
    source = write_jsonl(tmp_path / "b.jsonl", order)
    run([source], tmp_path / "b", shard_size=5000, val_fraction=0.1, vocab_size=512, num_proc=2)
    other_val, other_train = both_parts(tmp_path / "b", 512)
    assert set(other_val) == set(val) and set(other_train) == set(train)
    assert len(other_val) + len(other_train) == len(order)


def test_texts_that_differ_in_lone_surrogates_alone_are_on_one_side(tmp_path):
    """Their ids are equal: each surrogate becomes the replacement character."""
    lines = [f'{{"text": "doc {i} {mark}"}}' for i in range(200) for mark in (r"\ud800", r"\udc12", r"\ufffd")]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    run([tmp_path / "a.jsonl"], tmp_path / "out", shard_size=10_000, val_fraction=0.3)
    val, train = both_parts(tmp_path / "out")
    assert val and len(val) % 3 == 0 and not set(val) & set(train)


def test_held_out_documents_beyond_the_shard_are_left_out_and_counted(tmp_path, small_batches):
    manifest = run([write_jsonl(tmp_path / "a.jsonl", PAGES)], tmp_path / "a", shard_size=100, val_fraction=0.1)
    val, train = both_parts(tmp_path / "a")
    selected = [text for text in PAGES if int(hashlib.sha256(text.encode()).hexdigest()[:16], 16) < 2**64 // 10]
    assert set(val) < set(selected) and not set(train) & set(selected)
    assert manifest["odd_documents"] == {"held out beyond the validation shard": len(selected) - len(val)}
    assert 50 < manifest["shards"][0]["tokens"] <= 100
    assert manifest["documents"] == len(val) + len(train) == len(PAGES) - len(selected) + len(val)


def test_documents_for_validation_may_have_a_source_of_their_own(tmp_path, monkeypatch, small_batches):
    own = ["Held out, one.", "Held out, two.", "", PAGES[7]]
    val_source, source = write_jsonl(tmp_path / "val.jsonl", own), write_jsonl(tmp_path / "a.jsonl", PAGES)
    options = {"shard_size": 100, "val_fraction": None, "val_source": [str(val_source)]}
    manifest = run([source], tmp_path / "a", **options)
    val, train = both_parts(tmp_path / "a")
    assert val == [text for text in own if text]
    assert train == PAGES[:7] + PAGES[8:]  # never on both sides
    assert manifest["odd_documents"] == {"also in the validation source": 1}
    assert (manifest["val_source"], manifest["val_fraction"]) == ("val.jsonl", None)
    stop_after(monkeypatch, 30)
    with pytest.raises(StopError):
        run([source], tmp_path / "b", **options)
    stop_after(monkeypatch, None)
    run([source], tmp_path / "b", **options)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    write_jsonl(val_source, own[:2])
    with pytest.raises(SourceError, match=r"holds other data \(val_revision"):
        run([source], tmp_path / "b", **options)


def test_a_source_for_validation_fills_at_most_a_shard(tmp_path):
    val_source, source = write_jsonl(tmp_path / "val.jsonl", PAGES), write_jsonl(tmp_path / "a.jsonl", PAGES[::-1])
    manifest = run([source], tmp_path / "a", shard_size=200, val_fraction=None, val_source=[str(val_source)])
    val, train = both_parts(tmp_path / "a")
    assert val == PAGES[: len(val)] and 150 < manifest["shards"][0]["tokens"] <= 200
    assert set(train) == set(PAGES[len(val) :])


@pytest.mark.parametrize("fraction", [-0.1, 1, 1.5])
def test_an_impossible_fraction_is_refused(tmp_path, fraction):
    with pytest.raises(ValueError, match=f"--val_fraction {fraction}: must be at least 0 and less than 1"):
        run([write_jsonl(tmp_path / "a.jsonl", TEXTS)], tmp_path / "out", val_fraction=fraction)
    with pytest.raises(ValueError, match="--val_fraction and --val_source exclude each other"):
        run([tmp_path / "a.jsonl"], tmp_path / "out", val_fraction=0.1, val_source=["sample"])


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: os.truncate(path, 140)])
def test_a_validation_shard_lost_or_cut_short_between_two_runs_is_named(tmp_path, monkeypatch, small_batches, damage):
    source = write_jsonl(tmp_path / "a.jsonl", PAGES)
    stop_after(monkeypatch, 100)
    with pytest.raises(StopError):
        run([source], tmp_path / "out", val_fraction=0.1)
    damage(tmp_path / "out" / ".edufineweb_val_000000.npy.part")
    with pytest.raises(ValueError, match=r"edufineweb_val_000000\.npy\.part: missing or cut short"):
        run([source], tmp_path / "out", val_fraction=0.1)


def test_an_unfinished_folder_without_whole_shards_is_written_again(tmp_path):
    """A kill before the first whole shard leaves the mark alone. Then another recipe may take the folder."""
    source = write_jsonl(tmp_path / "a.jsonl", PAGES)
    run([source], tmp_path / "whole")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "progress.json").write_text(
        json.dumps({"source": "another", "tokenizer_fingerprint": "", "shards": []})
    )
    (tmp_path / "out" / ".edufineweb_val_000000.npy.part").write_bytes(b"half")
    (tmp_path / "out" / ".edufineweb_train_000001.npy.123.tmp").write_bytes(b"half")
    np.save(tmp_path / "out" / "edufineweb_train_000001.npy", np.zeros(100, np.uint16))  # not listed yet
    run([source], tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_folder_of_the_source_may_hold_the_shards(tmp_path, monkeypatch, small_batches):
    (tmp_path / "texts").mkdir()
    for name in ("a.jsonl", "b.jsonl"):
        write_jsonl(tmp_path / "texts" / name, [f"{name} {text}" for text in PAGES])
    run([tmp_path / "texts"], tmp_path / "whole")
    stop_after(monkeypatch, 100)
    with pytest.raises(StopError):
        run([tmp_path / "texts"], tmp_path / "texts" / "out")
    stop_after(monkeypatch, None)
    run([tmp_path / "texts"], tmp_path / "texts" / "out")
    run([tmp_path / "texts"], tmp_path / "texts" / "out")  # prepared already
    for path in (tmp_path / "whole").glob("*.npy"):
        assert (tmp_path / "texts" / "out" / path.name).read_bytes() == path.read_bytes()


# ---------------------------------------------------------------- the manifest


def test_the_manifests_figures_equal_a_recount(tmp_path, small_batches):
    # With 512 ids every text token is one byte, so the test can count bytes without the tokenizer.
    texts = [*TEXTS, "", *TEXTS]
    source = write_jsonl(tmp_path / "a.jsonl", texts)
    manifest = run([source], tmp_path / "out", vocab_size=512, shard_size=2000, val_fraction=0.3)
    assert manifest == json.loads((tmp_path / "out" / "manifest.json").read_text())
    files = [tmp_path / "out" / shard["file"] for shard in manifest["shards"]]
    for index, (shard, ids) in enumerate(zip(manifest["shards"], map(np.load, files), strict=True)):
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
    monkeypatch.setattr(readers, "BATCH_DOCUMENTS", documents_at_once)
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
@pytest.mark.parametrize("name", ["manifest.json", "progress.json"])
def test_a_garbage_mark_is_named(tmp_path, name, garbage):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_text(garbage)
    with pytest.raises(SourceError, match=rf"{name}: not a JSON object; delete"):
        run([write_jsonl(tmp_path / "a.jsonl", TEXTS)], tmp_path / "out")


def write_leftovers(folder, *indices):
    folder.mkdir()
    for index in indices:
        name = f"edufineweb_{'train' if index else 'val'}_{index:06d}.npy"
        np.save(folder / name, np.full(100, 7, dtype=np.uint16))


@pytest.mark.parametrize("indices", [(1,), (0, 1), (0, 1, 2)])
def test_shards_of_another_program_are_not_deleted(tmp_path, indices):
    """The shards of build-nanogpt have the same names, and no manifest."""
    write_leftovers(tmp_path / "out", *indices)
    (tmp_path / "out" / ".notes.tmp").write_text("mine")
    before = contents(tmp_path / "out")
    for source in (write_jsonl(tmp_path / "a.jsonl", TEXTS), tmp_path / "broken.parquet"):
        (tmp_path / "broken.parquet").write_text("broken")
        with pytest.raises(SourceError):
            run([source], tmp_path / "out")
        assert contents(tmp_path / "out") == before


@pytest.mark.parametrize("name", ["progress.json", "manifest.json"])
def test_a_mark_of_another_program_is_not_ours(tmp_path, name):
    """Its shards and its file stay, and a source of this name is not deleted."""
    write_leftovers(tmp_path / "out", 0, 1)
    (tmp_path / "out" / name).write_text('{"epoch": 3, "text": "mine"}')
    before = contents(tmp_path / "out")
    for source in (write_jsonl(tmp_path / "a.jsonl", TEXTS), tmp_path / "out" / name):
        with pytest.raises(SourceError, match=rf"{name}: not of this program; choose another --out_dir"):
            run([source], tmp_path / "out")
        assert contents(tmp_path / "out") == before


def test_a_file_in_the_place_of_the_folder_is_named(tmp_path):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(SourceError, match="out: a file, not a folder; choose another"):
        run([write_jsonl(tmp_path / "a.jsonl", TEXTS)], tmp_path / "out")


def test_a_folder_called_sample_is_not_the_sample(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sample").mkdir()
    write_jsonl(tmp_path / "sample" / "a.jsonl", ["word " * 30_000] * 2)
    manifest = run(["./sample"], tmp_path / "out", shard_size=None)
    assert len(manifest["shards"]) == 2  # of up to 100 million tokens


# ---------------------------------------------------------------- killed, and started again

ODD_TEXTS = [*TEXTS[:3], "", *TEXTS[3:6], None, "", *TEXTS[:7], "long " * 90, "", "x", "", *TEXTS[:7], None]


class StopError(Exception):
    pass


def stop_after(monkeypatch, batches):
    """Let the source fail after this number of batches, as the hub may. None: it does not fail."""
    read = sources.Source.__dict__.get("whole_read") or sources.Source.read
    monkeypatch.setattr(sources.Source, "whole_read", read, raising=False)

    def read_some(self, *args):
        for number, batch in enumerate(read(self, *args)):
            if number == batches:
                raise StopError
            yield batch

    monkeypatch.setattr(sources.Source, "read", read_some)


@pytest.mark.parametrize("max_tokens", [None, 700])
@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
@pytest.mark.parametrize("shard_size", [25, 60, 100])
def test_a_run_stopped_anywhere_and_resumed_writes_the_same_bytes(
    tmp_path, monkeypatch, small_batches, shard_size, name, max_tokens
):
    source = write(tmp_path / name, ODD_TEXTS)
    options = {"shard_size": shard_size, "max_tokens": max_tokens, "val_fraction": 0.3}
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


@pytest.mark.parametrize("change", ["first", "last before the border", "shorter"])
def test_rows_that_are_in_whole_shards_must_not_change(tmp_path, monkeypatch, change):
    """Also those of the batch in which the last whole shard ended."""
    texts = [f"{i} " * 40 for i in range(300)]
    source = write_jsonl(tmp_path / "a.jsonl", texts)
    stop_after(monkeypatch, 1)
    with pytest.raises(StopError):
        run([source], tmp_path / "out", shard_size=9000)
    stop_after(monkeypatch, None)
    progress = json.loads((tmp_path / "out" / "progress.json").read_text())
    assert progress["document"] == 0 and progress["shards"]
    if change == "shorter":
        texts = texts[:150]
    else:
        texts[0 if change == "first" else 199] = "another"
    write_jsonl(source, texts)
    with pytest.raises(SourceError, match="changed where an earlier run has read it"):
        run([source], tmp_path / "out", shard_size=9000)


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
    assert encoded == texts[6:]  # token 180 is in the eighth text, and the batch begins with the seventh
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
    write_jsonl(source, TEXTS[::-1] * 5)
    with pytest.raises(SourceError, match=r"a\.jsonl: changed where an earlier run has read it"):
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
    read = sources.Source.read

    def read_and_run_again(self, *args):
        monkeypatch.setattr(sources.Source, "read", read)
        with pytest.raises(SourceError, match="another run is preparing it"):
            run([source], tmp_path / "out")
        refused.append(True)
        yield from read(self, *args)

    monkeypatch.setattr(sources.Source, "read", read_and_run_again)
    run([source], tmp_path / "out")
    assert refused
    assert all_ids(tmp_path / "out") == ids_of(TEXTS)


KILLED_AT_A_CALL = """
import os, signal, sys
import load_fineweb_dataset, readers, sources

readers.BATCH_DOCUMENTS = 2
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
options = {"vocab_size": 600, "shard_size": 400, "val_fraction": 0.2, "show_progress": False}
load_fineweb_dataset.prepare([sys.argv[1]], sys.argv[2], **options)
"""


@pytest.mark.skipif(os.name != "posix", reason="no SIGKILL")
def test_the_run_after_a_kill_at_any_step_of_writing_makes_the_same_folder(tmp_path):
    # A file takes three calls: sync it, rename it, sync the folder. A shard needs two files: its own and progress.json.
    source = write_jsonl(tmp_path / "a.jsonl", ODD_TEXTS)
    run([source], tmp_path / "whole", shard_size=400, val_fraction=0.2)
    call, killed = 1, True
    while killed:
        out = tmp_path / str(call)
        done = run_script(tmp_path / "script.py", KILLED_AT_A_CALL, source, out, call)
        killed = done.returncode == -signal.SIGKILL
        assert killed or (done.returncode == 0 and call > 12), done.stderr
        run([source], out, shard_size=400, val_fraction=0.2)
        # A kill after the manifest leaves two small files that nothing reads.
        left = {name: body for name, body in contents(out).items() if name not in (".lock", "progress.json")}
        assert left == contents(tmp_path / "whole")
        call += 1


def kill_and_resume(tmp_path, kills):
    """Prepare a corpus in two processes. `kills` times, SIGKILL it or a worker at a random moment and start it again.

    Returns the number of kills, the number of resumes after whole shards, the folder's true sha256, and every sha256
    that a finished folder had.
    """
    text = (REPO / "preparation.py").read_text()
    source = write_jsonl(tmp_path / "a.jsonl", [f"{i} {text}" for i in range(2000)])
    options = {"vocab_size": 512, "shard_size": 300_000, "val_fraction": 0.05}
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


def test_a_full_disk_is_named_and_whole_shards_stay(tmp_path, monkeypatch, small_batches):
    source, write = write_jsonl(tmp_path / "a.jsonl", PAGES), ValidationShard.add

    def full(self, ids):
        if self.counts["tokens"] > 300:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(self, ids)

    monkeypatch.setattr(ValidationShard, "add", full)
    with pytest.raises(OSError, match=rf"No space left on device; make room: '{tmp_path / 'out'}"):
        run([source], tmp_path / "out", shard_size=1000, val_fraction=0.1)
    monkeypatch.undo()
    run([source], tmp_path / "out", shard_size=1000, val_fraction=0.1)
    run([source], tmp_path / "whole", shard_size=1000, val_fraction=0.1)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


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
    held_out, *lengths = [len(shard) for shard in shard_ids(sample)]
    assert 2**16 < held_out <= 2**17
    assert lengths[:-1] == [2**17] * (len(lengths) - 1)
    assert sum(lengths) > 10 * 2**17


def test_the_command_writes_the_same_sample_in_another_process(sample, tmp_path):
    command = [sys.executable, REPO / "load_fineweb_dataset.py", "--source", "sample", "--max_tokens", "300_000"]
    env = {**os.environ, "PYTHONHASHSEED": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "data" / "sample"  # where train.py looks for it
    assert done.stdout.startswith("data/sample: ")
    val, *train = shard_ids(folder)
    whole_val, *whole_train = shard_ids(sample)
    assert len(val) and len(train) > 1
    assert np.array_equal(val, whole_val[: len(val)])
    assert np.array_equal(train[0], whole_train[0])
    train, whole_train = np.concatenate(train), np.concatenate(whole_train)
    assert np.array_equal(train, whole_train[: len(train)])
