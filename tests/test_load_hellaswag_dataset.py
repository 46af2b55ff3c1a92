"""load_hellaswag_dataset.py: HellaSwag from the hub, and the offline sample. A server on this machine plays the hub."""

import hashlib
import io
import json
import os
import shutil
import sys
import threading
from collections import Counter

import huggingface_hub.constants
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hub_server import Hub

import load_hellaswag_dataset
from hellaswag_utils import iterate_rows, load_examples
from load_fineweb_dataset import SAMPLE_VOCAB_SIZE, prepare
from load_hellaswag_dataset import FILE_NAME, HUB_FILE, REPOSITORY, REVISION, download, write_sample
from sources import SourceError
from tokenizer import Tokenizer

ROWS = [
    {
        "ind": i,
        "activity_label": "Räume",
        "ctx_a": f"context {i}",
        "ctx_b": "",
        "ctx": f"context {i}",
        "endings": ["a", "b", "cé", "d"],
        "source_id": f"activitynet~{i}",
        "split": "val",
        "split_type": "indomain",
        "label": i % 4,
    }
    for i in range(5)
]


def old_file(rows=ROWS):
    """The bytes of the old jsonl file from GitHub."""
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def hub_file(rows=ROWS):
    """The bytes of the hub's parquet file. In it the label is a string."""
    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row | {"label": str(row["label"])} for row in rows]), file)
    return file.getvalue()


HUB_BYTES, OLD_BYTES = hub_file(), old_file()


@pytest.fixture
def pins(monkeypatch):
    """Pin our five rows in place of HellaSwag's 10,042."""
    monkeypatch.setattr(load_hellaswag_dataset, "HUB_SHA256", hashlib.sha256(HUB_BYTES).hexdigest())
    monkeypatch.setattr(load_hellaswag_dataset, "OLD_SHA256", hashlib.sha256(OLD_BYTES).hexdigest())
    monkeypatch.setattr(load_hellaswag_dataset, "NUM_ROWS", 5)


@pytest.fixture
def client(monkeypatch, tmp_path, pins):
    """Point the real client at an address on this machine, with an empty cache."""

    def point(endpoint):
        monkeypatch.setenv("NO_PROXY", "*")
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", endpoint)
        template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)

    return point


@pytest.fixture
def hub(client):
    server = Hub({HUB_FILE: HUB_BYTES}, REPOSITORY, REVISION)
    client(f"http://127.0.0.1:{server.server_address[1]}")
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def main(monkeypatch, capsys, *flags):
    monkeypatch.setattr(sys, "argv", ["load_hellaswag_dataset.py", *map(str, flags)])
    status = load_hellaswag_dataset.main()
    captured = capsys.readouterr()
    return status, captured.out, captured.err


# ---------------------------------------------------------------- from the hub


def test_the_hubs_rows_become_the_old_files_rows(hub, tmp_path):
    path = download(tmp_path / "a" / "out")
    assert path == tmp_path / "a" / "out" / FILE_NAME
    assert [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] == ROWS
    assert sorted(os.listdir(path.parent)) == [FILE_NAME, f"{FILE_NAME}.sha256"]
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert path.with_name(f"{FILE_NAME}.sha256").read_text() == f"{digest}  {FILE_NAME}\n"


def test_an_unchanged_file_is_not_fetched_again(hub, tmp_path):
    for _ in range(3):
        download(tmp_path / "out")
    assert len([path for method, path, _ in hub.requests if method == "GET"]) == 1


def test_a_changed_file_is_written_again_from_the_cache(hub, tmp_path, capsys):
    path = download(tmp_path / "out")
    good, requests = path.read_bytes(), len(hub.requests)
    path.write_bytes(good.replace(b"context 3", b"context 8"))
    assert download(tmp_path / "out").read_bytes() == good
    assert "changed since it was written" in capsys.readouterr().out
    assert len(hub.requests) == requests


def test_a_filled_cache_needs_no_hub(hub, tmp_path, monkeypatch):
    good = download(tmp_path / "out").read_bytes()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    hub.trouble = lambda handler, number: pytest.fail("the hub was asked")
    assert download(tmp_path / "other").read_bytes() == good


def test_the_error_for_an_empty_cache_offline_names_the_cure(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(SourceError, match=r"could not be reached .*HF_HUB_OFFLINE, if set"):
        download(tmp_path / "out")
    assert not hub.requests and not (tmp_path / "out").exists()


@pytest.mark.parametrize("status", [401, 403, 404, 451])
def test_a_file_that_the_hub_no_longer_gives_is_not_reported_as_a_network_that_is_down(hub, tmp_path, status):
    hub.trouble = lambda handler, number: handler.path != "/" and (handler.answer(status) or True)
    with pytest.raises(SourceError, match=rf"no longer gives this file \(status {status}\); pass --from FILE"):
        download(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_network_that_is_down_is_reported_in_one_sentence(client, tmp_path, monkeypatch, capsys):
    client("http://127.0.0.1:9")  # a port where nobody listens
    status, out, err = main(monkeypatch, capsys, "--out_dir", tmp_path / "out")
    (line,) = err.splitlines()
    assert (status, out) == (1, "")
    assert line.startswith("load_hellaswag_dataset.py: Rowan/hellaswag: the hub could not be reached (ConnectionError)")
    assert "check the network (and HF_ENDPOINT or HF_HUB_OFFLINE, if set) and run this again" in line
    assert line.endswith("--from FILE and --sample need no network")
    assert not (tmp_path / "out").exists()


def test_another_file_than_the_pinned_one_is_refused_and_not_kept_in_the_cache(hub, tmp_path):
    hub.files = {HUB_FILE: hub_file(ROWS[:4])}
    with pytest.raises(SourceError, match="what the hub sent is not HellaSwag"):
        download(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    hub.files = {HUB_FILE: HUB_BYTES}
    assert download(tmp_path / "out").is_file()


def test_a_bad_file_and_its_neighbours_stay_if_the_hub_gives_no_better_file(hub, tmp_path):
    hub.files = {}
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / FILE_NAME).write_bytes(b"mine")
    (tmp_path / "out" / "neighbour").write_bytes(b"mine too")
    with pytest.raises(SourceError):
        download(tmp_path / "out")
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == {
        FILE_NAME: b"mine",
        "neighbour": b"mine too",
    }


def test_a_busy_hub_is_asked_again(hub, tmp_path):
    """huggingface_hub waits and repeats the request. The first request is our own."""
    hub.trouble = lambda handler, number: number == 2 and (handler.answer(503, b"", Retry_After="0") or True)
    assert download(tmp_path / "out").is_file()
    assert len(hub.requests) > 3


# ---------------------------------------------------------------- from a local copy


@pytest.mark.parametrize("name", ["validation.parquet", FILE_NAME])
def test_both_kinds_of_local_copies_give_the_same_examples(client, tmp_path, monkeypatch, capsys, name):
    client("http://127.0.0.1:9")
    (tmp_path / name).write_bytes(HUB_BYTES if name.endswith("parquet") else OLD_BYTES)
    status, out, err = main(monkeypatch, capsys, "--from", tmp_path / name, "--out_dir", tmp_path / "out")
    assert (status, err) == (0, "") and "5 rows, verified" in out
    tokenizer = Tokenizer(vocab_size=600)
    (tmp_path / "expected.jsonl").write_bytes(OLD_BYTES)
    for style in ("gpt2", "lm-eval"):
        examples = load_examples(tmp_path / "out" / FILE_NAME, tokenizer, style=style)
        assert examples == load_examples(tmp_path / "expected.jsonl", tokenizer, style=style)


def test_an_old_file_that_is_already_in_the_folder_is_kept_as_it_is(client, tmp_path):
    client("http://127.0.0.1:9")
    (tmp_path / FILE_NAME).write_bytes(OLD_BYTES)
    assert download(tmp_path).read_bytes() == OLD_BYTES


@pytest.mark.parametrize("content", [b"", OLD_BYTES[:-10], OLD_BYTES.replace(b"3", b"8"), b"<html>\n", HUB_BYTES[:-1]])
def test_a_local_copy_that_is_not_hellaswag_is_refused(pins, tmp_path, content):
    (tmp_path / "copy").write_bytes(content)
    with pytest.raises(SourceError, match=r"copy: not HellaSwag's validation split .*; give an unchanged copy"):
        download(tmp_path / "out", tmp_path / "copy")
    assert not (tmp_path / "out").exists()


def test_a_local_copy_that_is_missing_is_named(pins, tmp_path, monkeypatch, capsys):
    status, _, err = main(monkeypatch, capsys, "--from", tmp_path / "nowhere", "--out_dir", tmp_path / "out")
    assert status == 1 and f"{tmp_path / 'nowhere'}: no such file; give a copy of {FILE_NAME}" in err


def test_a_full_disk_is_reported_in_one_sentence(pins, tmp_path, monkeypatch, capsys):
    def full(fd):
        raise OSError(28, "No space left on device")

    (tmp_path / "copy").write_bytes(OLD_BYTES)
    monkeypatch.setattr(os, "fsync", full)
    status, _, err = main(monkeypatch, capsys, "--from", tmp_path / "copy", "--out_dir", tmp_path / "out")
    assert status == 1 and "No space left on device; make room" in err and len(err.splitlines()) == 1
    assert not os.listdir(tmp_path / "out")


def test_the_pins_are_those_of_hellaswag():
    assert load_hellaswag_dataset.NUM_ROWS == 10_042
    assert load_hellaswag_dataset.REVISION == "218ec52e09a7e7462a5400043bb9a69a41d06b76"
    assert load_hellaswag_dataset.HUB_SHA256 == "899813071e1e95efafec90f856e1987d2150fa4d020fc005df6962c259f660cd"
    assert load_hellaswag_dataset.OLD_SHA256 == "0aa3b88843990f3f10a97b9575c94d7b71fb2205240ba04ae4884d9e9c992588"


# ---------------------------------------------------------------- the offline sample


@pytest.fixture(scope="module")
def sample(tmp_path_factory):
    """The folder that `python load_hellaswag_dataset.py --sample` leaves behind."""
    folder = tmp_path_factory.mktemp("sample")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "argv", ["load_hellaswag_dataset.py", "--sample"])
        patch.setattr(os, "fsync", lambda fd: None)
        assert load_hellaswag_dataset.main() == 0
    return folder / "data" / "sample"


@pytest.fixture(scope="module")
def rows(sample):
    return list(iterate_rows(sample / "sample_continuations.jsonl"))


@pytest.fixture(scope="module")
def held_out(sample):
    """The documents of the validation shard. The last one is cut where the shard ends."""
    ids = np.load(sample / "edufineweb_val_000000.npy").tolist()
    return Tokenizer(vocab_size=SAMPLE_VOCAB_SIZE).decode(ids).split("<|begin_of_text|>")[1:]


def test_the_samples_rows_have_hellaswags_format(rows):
    fields = ["ind", "activity_label", "ctx_a", "ctx_b", "ctx", "endings", "label", "split", "split_type", "source_id"]
    assert len(rows) == 200
    assert [row["ind"] for row in rows] == list(range(200))
    for row in rows:
        assert sorted(row) == sorted(fields)
        assert all(isinstance(row[name], str) for name in fields if name not in ("ind", "endings", "label"))
        assert f"{row['ctx_a']} {row['ctx_b']}".strip() == row["ctx"].strip()
        assert len(row["endings"]) == 4
        assert row["label"] in (0, 1, 2, 3)
        assert row["split"] == "val"


def test_the_samples_label_favours_no_place(rows):
    # Each place has 50 on average, with a standard deviation of 6. The wide limit tests the shuffle, not its luck.
    counts = Counter(row["label"] for row in rows)
    assert all(counts[label] > 25 for label in range(4))


def test_the_true_ending_follows_its_context_in_a_held_out_document(rows, held_out):
    for row in rows:
        stretch = f"{row['ctx']} {row['endings'][row['label']]}"
        assert any(stretch in document for document in held_out)


def test_the_false_endings_come_from_held_out_documents_and_do_not_follow_the_context(rows, held_out):
    for row in rows:
        assert len(set(row["endings"])) == 4
        for place, ending in enumerate(row["endings"]):
            assert any(ending in document for document in held_out)
            assert place == row["label"] or not any(f"{row['ctx']} {ending}" in document for document in held_out)


def test_length_alone_does_not_reveal_the_true_ending(rows):
    lengths = [len(ending) for row in rows for ending in row["endings"]]
    assert all(50 <= length <= 80 for length in lengths)
    longest = sum(max(row["endings"], key=len) == row["endings"][row["label"]] for row in rows)
    assert 25 < longest < 90  # 50 by chance


def test_the_sample_is_the_same_every_time(sample, tmp_path):
    write_sample(sample, tmp_path / "again.jsonl")
    assert (tmp_path / "again.jsonl").read_bytes() == (sample / "sample_continuations.jsonl").read_bytes()


def test_the_sample_does_not_touch_the_prepared_corpus(sample, tmp_path, monkeypatch):
    names = sorted(path.name for path in sample.iterdir() if path.suffix != ".npy")
    assert names == ["manifest.json", "sample_continuations.jsonl"]
    before = {path: path.stat().st_mtime_ns for path in sample.iterdir()}
    prepare(["sample"], sample, vocab_size=SAMPLE_VOCAB_SIZE, show_progress=False)  # what the tutorial runs next
    assert {path: path.stat().st_mtime_ns for path in sample.iterdir()} == before


def test_a_validation_shard_with_too_little_text_is_named(tmp_path):
    prepare(["sample"], tmp_path / "few", vocab_size=600, max_tokens=3000, val_fraction=0, show_progress=False)
    with pytest.raises(ValueError, match=r"few: its validation shard has text for 0 rows, and 200 are due"):
        write_sample(tmp_path / "few", tmp_path / "rows.jsonl", 600)
    assert not (tmp_path / "rows.jsonl").exists()


def test_the_sample_of_a_damaged_corpus_is_refused_in_one_sentence(sample, tmp_path, monkeypatch, capsys):
    data_root = tmp_path / "data" / "sample"
    data_root.mkdir(parents=True)
    shutil.copy(sample / "manifest.json", data_root)
    (data_root / "edufineweb_val_000000.npy").write_bytes(b"")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["load_hellaswag_dataset.py", "--sample"])
    assert load_hellaswag_dataset.main() == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "edufineweb_val_000000.npy" in line
    assert sorted(os.listdir(data_root)) == ["edufineweb_val_000000.npy", "manifest.json"]
