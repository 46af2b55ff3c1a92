import json
import shutil
import sys

import numpy as np
import pytest

import load_fineweb_dataset
from files import sha256_of
from load_fineweb_dataset import prepare
from tokenizer import Tokenizer

TEXTS = [letter * n for letter, n in zip("abcdefghij", range(10, 110, 10), strict=True)]  # n + 2 tokens each


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """570 tokens of single bytes, in shards of 100."""
    folder = tmp_path_factory.mktemp("prepared")
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in [*TEXTS, ""]))
    prepare([str(folder / "a.jsonl")], folder / "out", vocab_size=512, shard_size=100, show_progress=False)
    return folder / "out"


@pytest.fixture
def folder(prepared, tmp_path):
    return shutil.copytree(prepared, tmp_path / "out")


def main(monkeypatch, capsys, folder, flag):
    monkeypatch.setattr(sys, "argv", ["load_fineweb_dataset.py", "--out_dir", str(folder), flag])
    status = load_fineweb_dataset.main()
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_a_whole_folder_is_told_with_its_totals(folder, monkeypatch, capsys):
    status, out, _ = main(monkeypatch, capsys, folder, "--verify")
    assert status == 0
    assert out.endswith("out: whole; 6 shards, 10 documents, 570 tokens, 550 bytes of text, as the manifest says\n")


def test_every_byte_of_every_shard_is_compared(folder, monkeypatch, capsys):
    for path in sorted(folder.glob("*.npy")):
        whole = path.read_bytes()
        for place in (5, 60, 128, len(whole) - 1):  # header and ids
            path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
            status, out, err = main(monkeypatch, capsys, folder, "--verify")
            assert (status, out) == (1, "")
            assert f"load_fineweb_dataset.py: {path}: " in err
            assert "Traceback" not in err
        path.write_bytes(whole)
    assert main(monkeypatch, capsys, folder, "--verify")[0] == 0


def test_an_id_outside_the_vocabulary_is_named_even_where_the_hash_is_right(folder, monkeypatch, capsys):
    path = folder / "edufineweb_train_000002.npy"
    ids = np.load(path)
    ids[7] = 512
    np.save(path, ids)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["shards"][2]["sha256"] = sha256_of(path)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    status, _, err = main(monkeypatch, capsys, folder, "--verify")
    assert status == 1
    assert f"{path}: id 512 is outside the vocabulary of 512" in err


@pytest.mark.parametrize("key", ["tokens", "documents", "text_bytes"])
def test_counts_of_a_shard_are_recounted(folder, monkeypatch, capsys, key):
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["shards"][1][key] += 1
    (folder / "manifest.json").write_text(json.dumps(manifest))
    status, _, err = main(monkeypatch, capsys, folder, "--verify")
    assert status == 1
    assert f"edufineweb_train_000001.npy: {manifest['shards'][1][key] - 1} {key} where the manifest says" in err


@pytest.mark.parametrize("key", ["tokens", "documents"])
def test_totals_are_added_up_again(folder, monkeypatch, capsys, key):
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest[key] += 1
    (folder / "manifest.json").write_text(json.dumps(manifest))
    status, _, err = main(monkeypatch, capsys, folder, "--verify")
    assert status == 1 and "manifest.json: " in err and f" {key} where its shards have" in err


def change(manifest, key, value):
    manifest[key] = value


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda manifest: change(manifest, "format_version", 2), "manifest.json: format 2, this code reads 1"),
        (lambda manifest: change(manifest, "dtype", "uint32"), "manifest.json: dtype uint32 where uint16 is due"),
        (lambda manifest: change(manifest["shards"][2], "split", "val"), "train_000002.npy: the manifest has"),
        (lambda manifest: manifest["shards"].reverse(), "val_000000.npy: the manifest has edufineweb_train_000005"),
    ],
)
def test_a_manifest_that_no_loader_would_take_or_in_another_order_is_told(folder, monkeypatch, capsys, damage, words):
    manifest = json.loads((folder / "manifest.json").read_text())
    damage(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    status, _, err = main(monkeypatch, capsys, folder, "--verify")
    assert status == 1 and words in err


def test_missing_and_extra_shards_are_named(folder, monkeypatch, capsys):
    extra = folder / "edufineweb_train_000099.npy"
    shutil.copy(folder / "edufineweb_train_000001.npy", extra)
    status, _, err = main(monkeypatch, capsys, folder, "--verify")
    assert status == 1 and f"{extra}: not in the manifest" in err
    extra.unlink()
    (folder / "edufineweb_train_000003.npy").unlink()
    status, _, err = main(monkeypatch, capsys, folder, "--verify")
    assert status == 1 and "edufineweb_train_000003.npy: No such file" in err


@pytest.mark.parametrize("flag", ["--verify", "--stats"])
@pytest.mark.parametrize("damage", ["missing", "[]", "{", '{"shards": []}'])
def test_a_folder_without_a_manifest_is_told(folder, monkeypatch, capsys, flag, damage):
    path = folder / "manifest.json"
    path.unlink()
    if damage != "missing":
        path.write_text(damage)
    status, out, err = main(monkeypatch, capsys, folder, flag)
    assert (status, out) == (1, "")
    assert err.startswith(f"load_fineweb_dataset.py: {path}: not ")


def test_stats_equal_a_recount(folder, monkeypatch, capsys):
    status, out, _ = main(monkeypatch, capsys, folder, "--stats")
    assert status == 0
    lines = [" ".join(line.split()) for line in out.splitlines()]
    lengths = [len(text) + 2 for text in TEXTS]
    assert "documents 10" in lines
    assert "empty 1" in lines
    assert "tokens 570 in 6 shards, 512 ids" in lines
    assert f"bytes a token {550 / 570:.3f}" in lines
    assert f"tokens a document mean {sum(lengths) / 10:.0f}, largest {max(lengths)}" in lines
    assert f"50% have at most {np.quantile(lengths, 0.5):.0f}" in lines
    assert f"99% have at most {np.quantile(lengths, 0.99):.0f}" in lines


def test_stats_show_three_windows_of_the_corpus(folder, monkeypatch, capsys):
    out = main(monkeypatch, capsys, folder, "--stats")[1]
    corpus = Tokenizer(vocab_size=512).decode(
        np.concatenate(
            [np.load(folder / s["file"]) for s in json.loads((folder / "manifest.json").read_text())["shards"]]
        )
    )
    windows = out.split("\n----- ")[1:]
    assert len(windows) == 3
    for window in windows:
        text = window.partition("\n")[2].rstrip("\n")
        assert len(text) >= 70 and text in corpus
