import gzip
import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from test_preparation import (
    REPO,
    TEXTS,
    all_ids,
    ids_of,
    run,
    run_script,
    sentence,
    worker_pids,
    write,
    write_jsonl,
    write_parquet,
)

import load_fineweb_dataset
import sources
from rows import SourceError

# ---------------------------------------------------------------- the command line


pytestmark = pytest.mark.usefixtures("no_syncs")


def main(monkeypatch, *args):
    monkeypatch.setattr(sys, "argv", ["load_fineweb_dataset.py", *map(str, args)])
    return load_fineweb_dataset.main()


def refusal(monkeypatch, capsys, tmp_path, *sources, shard_size=100):
    args = ("--out_dir", tmp_path / "out", "--vocab_size", 600, "--shard_size", shard_size, "--num_proc", 1)
    args += ("--val_fraction", 0)
    status = main(monkeypatch, "--source", *sources, *args)
    captured = capsys.readouterr()
    assert captured.out == ""
    return status, sentence(captured.err)


def test_success_is_a_few_lines_of_figures_and_status_0(tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    texts = [f"{letter} text\nof several lines " + letter * 9000 for letter in "abcdefgh"]
    source = write_jsonl(tmp_path / "a.jsonl", [*texts, "", None])
    args = ("--source", source, "--out_dir", out, "--vocab_size", 512, "--num_proc", 1, "--val_fraction", 0.4)
    assert main(monkeypatch, *args) == 0
    captured = capsys.readouterr()
    lines, tokens = captured.out.splitlines(), len(texts) * len(f"<{texts[0]}>")
    assert lines[0].startswith(f"{out}: 8 documents, {tokens:,} tokens in 2 shards, ")
    manifest = json.loads((out / "manifest.json").read_text())
    for line, shard in zip(lines[1:3], manifest["shards"][::-1], strict=True):
        title = {"train": "training", "val": "validation"}[shard["split"]]
        assert re.fullmatch(
            rf"  {title} +{shard['documents']} documents +{shard['tokens']:,} tokens   . text of .*", line
        )
    assert lines[3] == "  odd documents: 1 empty, 1 null"
    assert lines[4].startswith("prepared in ")
    assert "load_fineweb_dataset.py" not in captured.err
    assert main(monkeypatch, *args) == 0  # the second time it does nothing
    assert capsys.readouterr().out.splitlines() == [*lines[:4], "already prepared"]


@pytest.mark.parametrize(
    ("fraction", "advice"),
    [
        (0.0001, "0 tokens are held out, too few to validate with: pass a larger --val_fraction"),
        (0.9999, "tokens are held out and 0 are left to train on: pass a smaller --val_fraction"),
    ],
)
def test_a_held_out_part_that_is_too_small_or_too_large_is_said(tmp_path, monkeypatch, capsys, fraction, advice):
    source = write_jsonl(tmp_path / "a.jsonl", ["few"])
    args = ("--vocab_size", 512, "--num_proc", 1, "--val_fraction", fraction)
    assert main(monkeypatch, "--source", source, "--out_dir", tmp_path / "out", *args) == 0
    assert advice in sentence(capsys.readouterr().err)
    assert main(monkeypatch, "--verify", "--out_dir", tmp_path / "out") == 0


def test_two_sources_never_get_the_same_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    sources = [
        "mine.jsonl",
        "other/mine.jsonl",
        "mine.json",
        "mine",
        "sample.jsonl",
        ".x.jsonl",
        "data/texts",
        "a b*.jsonl",
    ]
    for i, name in enumerate(sources):
        path = Path(name.replace("*", "1.jsonl"))
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.suffix:
            path.mkdir()
            path /= "1.jsonl"
        write_jsonl(path, [f"text {i} " * 20] * 2)
    folders = []
    for name in sources + sources[:2]:
        assert main(monkeypatch, "--source", name, "--vocab_size", 512, "--num_proc", 1) == 0
        folders.append(capsys.readouterr().out.partition(":")[0])
    assert folders[-2:] == folders[:2]
    assert len(set(folders)) == len(sources)
    assert folders[0] == "data/mine" and folders[5] == "data/x"
    assert all(re.fullmatch(r"data/mine-[0-9a-f]{8}", folder) for folder in folders[1:4])
    assert re.fullmatch(r"data/sample-[0-9a-f]{8}", folders[4])
    assert re.fullmatch(r"data/texts-[0-9a-f]{8}", folders[6])  # data/texts is the source itself
    assert os.listdir("data/texts") == ["1.jsonl"]
    assert folders[7] == "data/a-b"


def test_the_flags_of_a_source_reach_its_reader(tmp_path, monkeypatch, capsys):
    (tmp_path / "a.txt").write_bytes("caf\xe9\n--\nzwei".encode("latin-1"))
    (tmp_path / "b.jsonl").write_text('{"body": "three"}\n[]\n')
    (tmp_path / "val.txt").write_text("held out")
    args = ("--source", tmp_path / "a.txt", tmp_path / "b.jsonl", "--text_column", "body", "--encoding", "latin-1")
    args += ("--document_separator", r"\n--\n", "--skip_bad_rows", 1, "--val_source", tmp_path / "val.txt")
    assert main(monkeypatch, *args, "--out_dir", tmp_path / "out", "--vocab_size", 600, "--num_proc", 1) == 0
    assert "1 broken" in capsys.readouterr().out
    train = np.load(tmp_path / "out" / "edufineweb_train_000001.npy").tolist()
    assert train == ids_of(["café", "zwei", "three"])


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_the_summary_can_be_printed_in_any_encoding(tmp_path, encoding):
    source = write_jsonl(tmp_path / "a.jsonl", ["東京 🦙 Zürich"])
    command = [sys.executable, REPO / "load_fineweb_dataset.py", "--source", source, "--out_dir", tmp_path / "out"]
    env = {**os.environ, "PYTHONIOENCODING": encoding}
    done = subprocess.run([*command, "--num_proc", "1"], env=env, capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert b"prepared in" in done.stdout


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
    assert error.endswith("mend it, or pass --skip_bad_rows 1 or more")
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
    with pytest.raises(SourceError, match=r"a\.parquet: cannot be read \(Invalid UTF8 .*; replace the file"):
        run([tmp_path / "a.parquet"], tmp_path / "out", num_proc=num_proc)


def test_a_missing_column_is_named_with_the_columns_that_are_there(tmp_path, monkeypatch, capsys):
    path = write_parquet(tmp_path / "a.parquet", TEXTS, column="body")
    status, error = refusal(monkeypatch, capsys, tmp_path, path)
    assert status == 1
    assert f"{path}: no column 'text', only id, body" in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["a.tsv", "a.gz", "sample", "fineweb", "fineweb-edu"])
def test_an_unknown_format_is_refused_and_the_known_formats_are_named(tmp_path, monkeypatch, capsys, name):
    (tmp_path / name).write_text("text")  # an existing path wins over a name
    good = write_jsonl(tmp_path / "good.jsonl", TEXTS)
    status, error = refusal(monkeypatch, capsys, tmp_path, good, tmp_path / name)
    assert status == 1
    assert str(tmp_path / name) in error and ".jsonl, .ndjson, .json, .csv, .parquet, .arrow, .txt, or" in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["missing.jsonl", "missing.txt", "missing", "a/b/c"])
def test_a_missing_file_is_named(tmp_path, monkeypatch, capsys, name):
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
    assert len(os.listdir(tmp_path / "out")) == len(shards) + 2  # and progress.json, and the validation shard


def test_ctrl_c_keeps_whole_shards(tmp_path, monkeypatch, capsys, small_batches):
    read = sources.Source.read

    def interrupted(self, *args):
        for number, batch in enumerate(read(self, *args)):
            if number == 20:
                raise KeyboardInterrupt
            yield batch

    monkeypatch.setattr(sources.Source, "read", interrupted)
    source = write_jsonl(tmp_path / "a.jsonl", TEXTS * 10)
    status, error = refusal(monkeypatch, capsys, tmp_path, source)
    assert status == 130
    assert error.endswith("stopped; the same command goes on after the last whole shard")
    assert (tmp_path / "out" / "progress.json").exists()
    monkeypatch.setattr(sources.Source, "read", read)
    run([source], tmp_path / "out")
    assert all_ids(tmp_path / "out") == ids_of(TEXTS * 10)


CTRL_C = """
import multiprocessing, os, signal, sys, time
import load_fineweb_dataset, readers, sources

readers.BATCH_DOCUMENTS = 2
read = sources.Source.read

def read_until_interrupted(self, *args):
    for number, batch in enumerate(read(self, *args)):
        if number == 20:
            time.sleep(2)  # until the workers have started, or nearly so
            os.killpg(0, signal.SIGINT)  # as a terminal does: the workers get it too
            time.sleep(1000)
        yield batch

sources.Source.read = read_until_interrupted

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


@pytest.mark.parametrize("vocab_size", [0, 1, 511, 128_257])
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
    assert "HuggingFaceFW/fineweb-edu: could not be read from http://127.0.0.1:9 (ConnectionError)" in sentence(
        done.stderr
    )
    assert not (tmp_path / "out").exists()


def test_importing_the_module_does_no_work(tmp_path):
    script = (
        "import sys\n"
        "import load_fineweb_dataset\n"
        "print(sorted({'torch', 'pyarrow', 'datasets', 'huggingface_hub', 'requests'} & set(sys.modules)))\n"
    )
    done = run_script(tmp_path / "script.py", script, cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "[]\n", "")
    assert os.listdir(tmp_path) == ["script.py"]
