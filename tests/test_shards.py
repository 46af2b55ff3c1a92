"""shards.py: the layout, the reader and its refusals, and the check of a whole folder."""

import errno
import io
import json
import os
import shutil
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from test_dataloaders import VOCAB, change_manifest, open_stream, overwrite, write_folder

import load_fineweb_dataset
from files import sha256_of
from load_fineweb_dataset import prepare
from shards import is_prepared, shard_name, token_dtype
from tokenizer import Tokenizer

# ---------------------------------------------------------------- layout


@pytest.mark.parametrize(
    ("index", "name"),
    [
        (0, "edufineweb_val_000000.npy"),
        (1, "edufineweb_train_000001.npy"),
        (123_456, "edufineweb_train_123456.npy"),
    ],
)
def test_shard_names(index, name):
    assert shard_name(index) == name


@pytest.mark.parametrize(
    ("vocab_size", "name"),
    [(256, "uint8"), (257, "uint16"), (512, "uint16"), (65_536, "uint16"), (65_537, "uint32"), (128_256, "uint32")],
)
def test_the_token_dtype_is_the_narrowest_that_holds_the_largest_id(vocab_size, name):
    dtype = token_dtype(vocab_size)
    assert dtype.name == name
    assert np.array([vocab_size - 1]).astype(dtype)[0] == vocab_size - 1


def test_a_folder_is_prepared_once_its_manifest_is_there(tmp_path):
    (tmp_path / shard_name(0)).touch()
    assert not is_prepared(tmp_path)
    assert not is_prepared(tmp_path / "missing")
    (tmp_path / "manifest.json").touch()
    assert is_prepared(tmp_path)


# ---------------------------------------------------------------- reader


@pytest.fixture
def folder(tmp_path):
    return write_folder(tmp_path / "data")


def test_the_reader_reads_what_load_fineweb_dataset_writes(tmp_path):
    texts = ["First.", "Zürich, 東京 🦙", "third " * 40]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    held_out = json.dumps({"text": "held out"}) + "\n"
    (tmp_path / "val.jsonl").write_text(held_out)
    options = {"vocab_size": 600, "shard_size": 50, "val_source": [str(tmp_path / "val.jsonl")]}
    prepare([str(tmp_path / "a.jsonl")], tmp_path / "out", **options, show_progress=False)
    tokenizer = Tokenizer(vocab_size=600)
    for split, documents in (("train", texts), ("val", ["held out"])):
        stream = open_stream(tmp_path / "out", split, 600, tokenizer.fingerprint)
        ids = [i for text in documents for i in tokenizer.encode(text, bos=True, eos=True)]
        assert stream.read(0, len(stream)).tolist() == ids


def test_read_equals_a_slice_of_the_concatenated_shards(tmp_path):
    lengths = (3, 1, 7, 1, 1, 5)
    root = write_folder(tmp_path, train=lengths)
    stream = open_stream(root)
    whole = np.concatenate([np.load(root / f"edufineweb_train_{i:06d}.npy") for i in range(1, 7)])
    assert len(stream) == len(whole) == sum(lengths)
    for start in range(len(whole)):
        for stop in range(start + 1, len(whole) + 1):
            piece = stream.read(start, stop)
            assert piece.dtype == np.int64
            assert piece.tolist() == whole[start:stop].tolist()


def test_the_splits_are_separate_streams(folder):
    assert open_stream(folder, "val").read(0, 61).tolist() == list(range(61))
    assert len(open_stream(folder, "val")) == 61
    assert len(open_stream(folder, "train")) == 257


def test_ids_beyond_16_bits_are_read_whole(tmp_path):
    root = write_folder(tmp_path, train=(3,), vocab_size=128_256, dtype="uint32")
    np.save(root / "edufineweb_train_000001.npy", np.array([65_535, 65_536, 128_255], dtype=np.uint32))
    assert open_stream(root, vocab_size=128_256).read(0, 3).tolist() == [65_535, 65_536, 128_255]


def test_a_folder_without_manifest_is_refused_with_the_command_that_prepares_it(folder):
    (folder / "manifest.json").unlink()
    with pytest.raises(FileNotFoundError) as error:
        open_stream(folder)
    assert str(folder / "manifest.json") in str(error.value)
    assert f"`python load_fineweb_dataset.py --out_dir {folder} --vocab_size {VOCAB}`" in str(error.value)


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"\xff\x00", b"null", b"[]", b"{}", b'{"format_version": 1, "shards": 3}', b"<html>sorry</html>"],
)
def test_a_garbage_manifest_is_refused(folder, content):
    (folder / "manifest.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"not a manifest.*prepare it anew") as error:
        open_stream(folder)
    assert str(error.value).startswith(str(folder / "manifest.json"))


@pytest.mark.parametrize("shard", [{}, {"split": "train"}, {"split": "train", "file": "x.npy", "tokens": None}])
def test_a_manifest_with_a_garbage_shard_is_refused(folder, shard):
    change_manifest(folder, shards=[shard])
    with pytest.raises(ValueError, match=r"not a manifest.*prepare it anew"):
        open_stream(folder)


def test_another_format_version_is_refused(folder):
    change_manifest(folder, format_version=2)
    with pytest.raises(ValueError, match=r"manifest\.json: format 2, this code reads 1; prepare it anew"):
        open_stream(folder)


def test_another_vocabulary_is_refused_with_both_cures(folder):
    with pytest.raises(ValueError) as error:
        open_stream(folder, vocab_size=512)
    assert str(folder / "manifest.json") in str(error.value)
    assert f"--model.vocab_size {VOCAB}" in str(error.value)
    assert "--vocab_size 512" in str(error.value)


def test_another_tokenizer_is_refused(folder):
    with pytest.raises(ValueError, match=r"manifest\.json: written with another tokenizer .*prepare the folder anew"):
        open_stream(folder, fingerprint="another's")
    assert len(open_stream(folder, fingerprint=None)) == 257  # None: the caller has no tokenizer to compare


@pytest.mark.parametrize("dtype", ["uint8", "uint32", "int16", "float32", "no dtype", None])
def test_another_dtype_than_the_vocabularys_is_refused(folder, dtype):
    change_manifest(folder, dtype=dtype)
    with pytest.raises(ValueError, match=rf"manifest\.json: dtype {dtype!r} .*uint16.*prepare the folder anew"):
        open_stream(folder)


def test_a_folder_without_the_split_is_refused(tmp_path):
    root = write_folder(tmp_path, train=())
    assert len(open_stream(root, "val")) == 61
    with pytest.raises(ValueError, match=r"manifest\.json: lists no train shard.*smaller --val_fraction"):
        open_stream(root, "train")


def truncate(path):
    path.write_bytes(path.read_bytes()[:-10])


def truncate_header(path):
    path.write_bytes(path.read_bytes()[:20])


def empty(path):
    path.write_bytes(b"")


def garbage(path):
    path.write_bytes(b"<html>404 Not Found</html>" * 20)


def zipped(path):  # np.savez would leave such a file under this name
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        file.writestr("tokens", path.read_bytes())
    path.write_bytes(buffer.getvalue())


def another_dtype(path):
    np.save(path, np.load(path).astype(np.uint32))


def signed(path):
    np.save(path, np.load(path).astype(np.int16))


def shorter(path):
    np.save(path, np.load(path)[:-1])


def longer(path):
    np.save(path, np.append(np.load(path), np.uint16(1)))


def two_dimensional(path):
    np.save(path, np.load(path)[None])


def objects(path):  # a pickle: loading it could run code
    np.save(path, np.array([{}] * 100, dtype=object), allow_pickle=True)


DAMAGES = [truncate, truncate_header, empty, garbage, zipped, another_dtype, signed, shorter, longer]


DAMAGES += [two_dimensional, objects]


# The last shard too: a check that opens all shards at once must not blame the first.
@pytest.mark.parametrize("index", [1, 3])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_or_replaced_shard_is_refused_by_its_name(folder, damage, index):
    path = folder / f"edufineweb_train_{index:06d}.npy"
    damage(path)
    with pytest.raises(ValueError, match="prepare the folder anew") as error:
        open_stream(folder)
    assert str(error.value).startswith(str(path))


@pytest.mark.parametrize("index", [1, 3])
def test_a_missing_shard_is_refused_by_its_name(folder, index):
    path = folder / f"edufineweb_train_{index:06d}.npy"
    path.unlink()
    with pytest.raises((FileNotFoundError, ValueError), match="prepare the folder anew") as error:
        open_stream(folder)
    assert str(error.value).startswith(f"{path}: listed in the manifest but missing")


@pytest.mark.parametrize("index", [1, 3])
@pytest.mark.parametrize("value", [VOCAB, 2**16 - 1])
def test_an_id_beyond_the_vocabulary_is_refused_at_the_start(folder, index, value):
    path = folder / f"edufineweb_train_{index:06d}.npy"
    overwrite(path, -1, value)
    with pytest.raises(ValueError, match=f"holds id {value}, the vocabulary ends at 4095; prepare") as error:
        open_stream(folder)
    assert str(error.value).startswith(str(path))


def test_the_largest_id_of_the_vocabulary_is_accepted(folder):
    overwrite(folder / "edufineweb_train_000001.npy", 0, VOCAB - 1)
    assert open_stream(folder).read(0, 1).tolist() == [VOCAB - 1]


def test_a_shard_that_becomes_shorter_while_a_run_reads_it_is_named(folder):
    stream = open_stream(folder)
    path = folder / "edufineweb_train_000002.npy"  # stream positions 100 to 199
    os.truncate(path, path.stat().st_size - 2)
    assert stream.read(90, 199).tolist() == list(range(90, 199))
    with pytest.raises(ValueError, match=r"cannot be read any more \(it has become shorter\)") as error:
        stream.read(90, 200)
    assert str(error.value).startswith(str(path))


def test_a_shard_on_a_failing_disk_is_named(folder):
    class Failing(io.BytesIO):
        def readinto(self, buffer):
            raise OSError(errno.EIO, "Input/output error")

    stream = open_stream(folder)
    stream._open_files[1] = Failing(), 128
    assert len(stream.read(0, 100)) == 100
    with pytest.raises(ValueError, match=r"000002\.npy: cannot be read any more .*Input/output error"):
        stream.read(0, 101)


def test_threads_may_share_a_stream(folder):
    stream = open_stream(folder)
    ids = stream.read(0, 257).tolist()

    def read_alone(first):
        return all(stream.read(i, i + 3).tolist() == ids[i : i + 3] for i in range(first, 250, 4) for _ in range(20))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(read_alone, range(4)))


# ---------------------------------------------------------------- check of a whole folder

TEXTS = [letter * n for letter, n in zip("abcdefghij", range(10, 110, 10), strict=True)]  # n + 2 tokens each


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """570 tokens of single bytes: 102 for validation, the others in shards of 120."""
    folder = tmp_path_factory.mktemp("prepared")
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in [*TEXTS, ""]))
    options = {"vocab_size": 512, "shard_size": 120, "val_fraction": 0.05}
    manifest = prepare([str(folder / "a.jsonl")], folder / "out", **options, show_progress=False)
    assert [shard["tokens"] for shard in manifest["shards"]] == [102, 120, 120, 120, 108]
    return folder / "out"


@pytest.fixture
def copied(prepared, tmp_path):
    return shutil.copytree(prepared, tmp_path / "out")


def main(monkeypatch, capsys, copied, flag):
    monkeypatch.setattr(sys, "argv", ["load_fineweb_dataset.py", "--out_dir", str(copied), flag])
    status = load_fineweb_dataset.main()
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_verify_prints_the_totals_of_a_whole_folder(copied, monkeypatch, capsys):
    status, out, _ = main(monkeypatch, capsys, copied, "--verify")
    assert status == 0
    assert out.endswith("out: whole; 5 shards, 10 documents, 570 tokens, 550 bytes of text, as the manifest says\n")


def test_verify_compares_every_byte_of_every_shard(copied, monkeypatch, capsys):
    for path in sorted(copied.glob("*.npy")):
        whole = path.read_bytes()
        for place in (5, 60, 128, len(whole) - 1):  # header and ids
            path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
            status, out, err = main(monkeypatch, capsys, copied, "--verify")
            assert (status, out) == (1, "")
            assert f"load_fineweb_dataset.py: {path}: " in err
            assert "Traceback" not in err
        path.write_bytes(whole)
    assert main(monkeypatch, capsys, copied, "--verify")[0] == 0


def test_an_id_outside_the_vocabulary_is_named_even_where_the_hash_is_right(copied, monkeypatch, capsys):
    path = copied / "edufineweb_train_000002.npy"
    ids = np.load(path)
    ids[7] = 512
    np.save(path, ids)
    manifest = json.loads((copied / "manifest.json").read_text())
    manifest["shards"][2]["sha256"] = sha256_of(path)
    (copied / "manifest.json").write_text(json.dumps(manifest))
    status, _, err = main(monkeypatch, capsys, copied, "--verify")
    assert status == 1
    assert f"{path}: id 512 is outside the vocabulary of 512" in err


@pytest.mark.parametrize("key", ["tokens", "documents", "text_bytes"])
def test_verify_counts_a_shard_again(copied, monkeypatch, capsys, key):
    manifest = json.loads((copied / "manifest.json").read_text())
    manifest["shards"][1][key] += 1
    manifest["tokens"] += key == "tokens"
    manifest["documents"] += key == "documents"
    (copied / "manifest.json").write_text(json.dumps(manifest))
    status, _, err = main(monkeypatch, capsys, copied, "--verify")
    assert status == 1
    assert f"edufineweb_train_000001.npy: {manifest['shards'][1][key] - 1} {key} where the manifest says" in err


@pytest.mark.parametrize("key", ["tokens", "documents"])
def test_verify_adds_up_the_totals_again(copied, monkeypatch, capsys, key):
    manifest = json.loads((copied / "manifest.json").read_text())
    manifest[key] += 1
    (copied / "manifest.json").write_text(json.dumps(manifest))
    status, _, err = main(monkeypatch, capsys, copied, "--verify")
    assert status == 1 and "manifest.json: " in err and f" {key} where its shards have" in err


def change(manifest, key, value):
    manifest[key] = value


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda manifest: change(manifest, "format_version", 2), "manifest.json: format 2, this code reads 1"),
        (lambda manifest: change(manifest, "dtype", "uint32"), "manifest.json: dtype 'uint32' where uint16 is due"),
        (
            lambda manifest: change(manifest["shards"][2], "split", "val"),
            "of split 'val' in the place of edufineweb_train_000002.npy",
        ),
        (lambda manifest: manifest["shards"].reverse(), "in the place of edufineweb_val_000000.npy"),
    ],
)
def test_verify_refuses_a_manifest_that_no_loader_takes_or_in_another_order(copied, monkeypatch, capsys, damage, words):
    manifest = json.loads((copied / "manifest.json").read_text())
    damage(manifest)
    (copied / "manifest.json").write_text(json.dumps(manifest))
    status, _, err = main(monkeypatch, capsys, copied, "--verify")
    assert status == 1 and words in err


def test_missing_and_extra_shards_are_named(copied, monkeypatch, capsys):
    extra = copied / "edufineweb_train_000099.npy"
    shutil.copy(copied / "edufineweb_train_000001.npy", extra)
    status, _, err = main(monkeypatch, capsys, copied, "--verify")
    assert status == 1 and f"{extra}: not in the manifest" in err
    extra.unlink()
    (copied / "edufineweb_train_000003.npy").unlink()
    status, _, err = main(monkeypatch, capsys, copied, "--verify")
    assert status == 1 and "edufineweb_train_000003.npy: listed in the manifest but missing" in err


@pytest.mark.parametrize("flag", ["--verify", "--stats"])
@pytest.mark.parametrize("damage", ["missing", "[]", "{", '{"shards": []}'])
def test_a_folder_without_a_usable_manifest_is_refused(copied, monkeypatch, capsys, flag, damage):
    path = copied / "manifest.json"
    path.unlink()
    if damage != "missing":
        path.write_text(damage)
    status, out, err = main(monkeypatch, capsys, copied, flag)
    assert (status, out) == (1, "")
    assert err.startswith(f"load_fineweb_dataset.py: {path}: not ")


def test_stats_equal_a_recount(copied, monkeypatch, capsys):
    status, out, _ = main(monkeypatch, capsys, copied, "--stats")
    assert status == 0
    lines = [" ".join(line.split()) for line in out.splitlines()]
    lengths = [len(text) + 2 for text in TEXTS]
    assert "documents 10" in lines
    assert "empty 1" in lines
    assert "tokens 570 in 5 shards, 512 ids" in lines
    assert f"bytes a token {550 / 570:.3f}" in lines
    assert f"tokens a document mean {sum(lengths) / 10:.0f}, largest {max(lengths)}" in lines
    assert f"50% have at most {np.quantile(lengths, 0.5):.0f}" in lines
    assert f"99% have at most {np.quantile(lengths, 0.99):.0f}" in lines


def test_stats_show_three_windows_of_the_corpus(copied, monkeypatch, capsys):
    out = main(monkeypatch, capsys, copied, "--stats")[1]
    corpus = Tokenizer(vocab_size=512).decode(
        np.concatenate(
            [np.load(copied / s["file"]) for s in json.loads((copied / "manifest.json").read_text())["shards"]]
        )
    )
    windows = out.split("\n----- ")[1:]
    assert len(windows) == 3
    for window in windows:
        text = window.partition("\n")[2].rstrip("\n")
        assert len(text) >= 70 and text in corpus
