"""Reading from the hub. A server on this machine plays the hub. The client is the real one, in its own process."""

import gzip
import hashlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from hub_server import Hub

from files import check_free_space
from hub import DatasetName, parse_name
from preparation import prepare
from rows import ReadOptions, SourceError
from sources import FINEWEB, check_flags, open_source

REPO = Path(__file__).resolve().parents[1]
NUM_FILES, NUM_DOCUMENTS = 3, 700
TEXTS = [[f"File {f}, page {i}: " + "word " * (i % 90) for i in range(NUM_DOCUMENTS)] for f in range(NUM_FILES)]
PATHS = [f"{FINEWEB.folder}/{i:03d}_00000.parquet" for i in range(NUM_FILES)]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Path on the hub -> bytes of a parquet file with several row groups."""
    folder, files = tmp_path_factory.mktemp("files"), {}
    for path, texts in zip(PATHS, TEXTS, strict=True):
        table = pyarrow.table({"id": [str(i) for i in range(len(texts))], "text": texts})
        pyarrow.parquet.write_table(table, folder / "file", row_group_size=150, compression="none")
        files[path] = (folder / "file").read_bytes()
    return files


@contextmanager
def serving(server):
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def hub(files):
    with serving(Hub(files, FINEWEB.repository, FINEWEB.revision)) as server:
        yield server


LOAD = """
import sys
import huggingface_hub.constants
import hub, hub_dataset, load_fineweb_dataset

huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE = 1000  # the default, ten million, is more than these files have
hub_dataset.RETRY_SECONDS = (0.1, 0.1, 0.1)
hub.STREAM_BLOCK = 20_000  # several requests a file

if __name__ == "__main__":
    sys.exit(load_fineweb_dataset.main())
"""


LOAD_EACH = LOAD.replace(
    "    sys.exit(load_fineweb_dataset.main())\n",
    """
    words, sys.argv = sys.argv[9:], sys.argv[:9]
    for word in words:
        sys.argv[9:] = ["--source", word]
        print(load_fineweb_dataset.main())
""",
)


def load(hub, tmp_path, *flags, offline=False, script=LOAD, **options):
    """Run the command in a process of its own that can reach only this hub."""
    (tmp_path / "script.py").write_text(script)
    env = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
    env |= {"HF_ENDPOINT": f"http://127.0.0.1:{hub.server_address[1]}", "HF_HOME": str(tmp_path / "hf")}
    env |= {"HF_UPDATE_DOWNLOAD_COUNTS": "0", "HF_HUB_OFFLINE": str(int(offline))}
    env |= {"PYTHONPATH": str(REPO), "NO_PROXY": "*", "HF_HUB_DOWNLOAD_TIMEOUT": "1", "HF_HUB_DISABLE_XET": "1"}
    command = [sys.executable, tmp_path / "script.py", "--out_dir", tmp_path / "out", "--vocab_size", "600"]
    command += ["--shard_size", "10_000", "--num_proc", "1", *flags]
    command = [str(word).replace("_000", "000") if word == "10_000" else str(word) for word in command]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=120, **options)


@pytest.fixture(scope="module")
def expected(files, tmp_path_factory):
    """The shards of the same documents from local files: name -> bytes."""
    folder = tmp_path_factory.mktemp("expected")
    paths = []
    for path, body in files.items():
        paths.append(folder / Path(path).name)
        paths[-1].write_bytes(body)
    prepare([str(path) for path in paths], folder / "out", vocab_size=600, shard_size=10_000, show_progress=False)
    return shards(folder / "out")


def shards(folder):
    return {path.name: path.read_bytes() for path in folder.glob("*.npy")}


def downloads(hub, number):
    return [
        request_range for command, path, request_range in hub.requests if command == "GET" and PATHS[number] in path
    ]


MODES = pytest.mark.parametrize("flags", [[], ["--stream"]], ids=["download", "stream"])


@MODES
def test_the_shards_hold_the_files_of_the_pinned_revision(hub, tmp_path, expected, flags):
    done = load(hub, tmp_path, *flags)
    assert done.returncode == 0, done.stderr
    assert shards(tmp_path / "out") == expected
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert (manifest["source"], manifest["revision"]) == (str(FINEWEB), FINEWEB.revision)
    assert manifest["documents"] == NUM_FILES * NUM_DOCUMENTS
    kept = [path for path in (tmp_path / "hf").rglob("blobs/*") if path.stat().st_size > 10_000]
    assert len(kept) == (0 if flags else NUM_FILES)  # --stream leaves no copy


def test_a_finished_folder_needs_no_hub(hub, tmp_path):
    assert load(hub, tmp_path).returncode == 0
    hub.requests.clear()
    done = load(hub, tmp_path)
    assert done.returncode == 0 and "already prepared" in done.stdout
    assert not hub.requests


@MODES
@pytest.mark.parametrize("status", [429, 503])
def test_a_busy_hub_is_asked_again_after_the_time_that_it_names(hub, tmp_path, expected, flags, status):
    asked = []

    def busy(handler, number):
        if handler.is_body_of(1):
            asked.append(time.monotonic())
            if len(asked) == 1:
                handler.answer(status, b"", Retry_After="1")
                return True

    hub.trouble = busy
    done = load(hub, tmp_path, *flags)
    assert done.returncode == 0, done.stderr
    assert shards(tmp_path / "out") == expected
    if status == 429:
        assert asked[1] - asked[0] >= 1


@MODES
@pytest.mark.parametrize("kind", ["drop", "stall"])
def test_reading_goes_on_after_a_body_breaks_off(hub, tmp_path, expected, flags, kind):
    broken = []

    def break_off(handler, number):
        if handler.is_body_of(1) and not broken:
            broken.append(handler.headers.get("Range"))
            first, last = re.fullmatch(r"bytes=(\d+)-(\d*)", broken[-1] or "bytes=0-").groups()
            size = len(hub.files[PATHS[1]])
            last = min(int(last or size), size - 1)
            body = hub.files[PATHS[1]][int(first) : last + 1]
            handler.send_response(206 if broken[-1] else 200)
            handler.send_header("Content-Length", str(len(body)))
            handler.send_header("Content-Range", f"bytes {first}-{last}/{size}")
            handler.end_headers()
            handler.wfile.write(body[: len(body) // 2])
            handler.wfile.flush()
            if kind == "stall":
                time.sleep(2)  # longer than the client waits
            handler.close_connection = True
            return True

    hub.trouble = break_off
    done = load(hub, tmp_path, *flags)
    assert done.returncode == 0, done.stderr
    assert broken
    assert shards(tmp_path / "out") == expected
    if not flags:  # the half that had arrived was not sent again
        half = len(hub.files[PATHS[1]]) // 2
        assert downloads(hub, 1) == [None, f"bytes={half // 1000 * 1000}-"]


def test_after_a_kill_whole_files_are_not_fetched_again(hub, tmp_path, expected):
    def half_and_kill(handler, number):
        if handler.is_body_of(1):
            body = hub.files[PATHS[1]]
            handler.send_response(200)
            handler.send_header("Content-Length", str(len(body)))
            handler.end_headers()
            handler.wfile.write(body[: len(body) // 2])
            handler.wfile.flush()
            time.sleep(0.5)
            subprocess.run(["pkill", "-KILL", "-f", str(tmp_path / "script.py")], check=True)
            return True

    hub.trouble = half_and_kill
    assert load(hub, tmp_path).returncode == -signal.SIGKILL
    hub.trouble = None
    hub.requests.clear()
    done = load(hub, tmp_path)
    assert done.returncode == 0, done.stderr
    assert shards(tmp_path / "out") == expected
    assert (len(downloads(hub, 1)), len(downloads(hub, 2))) == (1, 1)
    size = len(hub.files[PATHS[0]])  # the first file: at most its end, which has the row counts
    assert all(wanted and int(wanted[6:].partition("-")[0]) > size // 2 for wanted in downloads(hub, 0))


@MODES
def test_a_hub_that_fails_for_good_ends_the_run_and_the_next_run_goes_on(hub, tmp_path, expected, flags):
    def fail(handler, number):
        if handler.is_body_of(2):
            handler.answer(403, b"no")
            return True

    hub.trouble = fail
    done = load(hub, tmp_path, *flags)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert f"{FINEWEB.repository}: the hub does not give it (status 403)" in done.stderr.splitlines()[-1]
    whole = shards(tmp_path / "out")
    assert whole and "manifest.json" not in os.listdir(tmp_path / "out")
    hub.trouble = None
    hub.requests.clear()
    assert load(hub, tmp_path, *flags).returncode == 0
    assert shards(tmp_path / "out") == expected
    assert expected.items() >= whole.items()
    if flags:  # the first file: only its end, which has the row counts
        assert all(int(wanted[6:].partition("-")[0]) > 0 for wanted in downloads(hub, 0))
    else:
        assert len(downloads(hub, 2)) == 1


def test_a_file_with_another_size_or_content_than_listed_is_not_used(hub, tmp_path, expected):
    hub.wrong_size = 1
    done = load(hub, tmp_path)
    assert done.returncode == 1
    assert "000_00000.parquet came damaged" in done.stderr.splitlines()[-1]
    assert not (tmp_path / "out").exists()
    hub.wrong_size = 0
    body, sent = hub.files[PATHS[1]], []

    def damaged_once(handler, number):
        if handler.is_body_of(1) and not sent:
            sent.append(True)
            headers = {"ETag": f'"{hashlib.sha256(body).hexdigest()}"', "X_Repo_Commit": FINEWEB.revision}
            handler.answer(200, body[:5000] + b"X" + body[5001:], **headers)
            return True

    hub.trouble = damaged_once
    done = load(hub, tmp_path)
    assert done.returncode == 0, done.stderr
    assert sent
    assert "001_00000.parquet came damaged; trying again" in done.stderr
    assert shards(tmp_path / "out") == expected


def test_a_download_that_the_disk_cannot_hold_is_refused_before_it_starts(hub, tmp_path):
    hub.wrong_size = 10**18
    done = load(hub, tmp_path)
    assert done.returncode == 1
    downloads = NUM_FILES * 10**18 + sum(map(len, hub.files.values()))
    message = done.stderr.splitlines()[-1]
    needed = int(re.search(r"needs ([\d,]+) bytes, and the disk has ", message)[1].replace(",", ""))
    tokens = downloads / 2.85 * 1.5  # of FineWeb-Edu's files, with a small vocabulary
    assert needed == pytest.approx(downloads + 2 * tokens)
    assert "Traceback" not in done.stderr
    assert not any("/resolve/" in path for _, path, _ in hub.requests)
    assert not (tmp_path / "out").exists()
    done = load(hub, tmp_path, "--max_tokens", "1000")  # in the first file, but two more are read ahead
    assert f"needs {downloads + 1000 * 2:,} bytes, and " in done.stderr.splitlines()[-1]
    hub.wrong_size = 0
    done = load(hub, tmp_path, "--max_tokens", "1000")
    assert done.returncode == 0, done.stderr  # now there is room


def test_a_disk_needs_room_for_the_sum_of_all_that_goes_there(tmp_path):
    free = shutil.disk_usage(tmp_path).free
    check_free_space([(tmp_path / "a", free // 2)])
    with pytest.raises(OSError, match="make room"):
        check_free_space([(tmp_path / "a" / "b", free // 3 * 2), (tmp_path / "c", free // 3 * 2)])


def test_stream_is_refused_if_the_source_is_not_the_hub(hub, tmp_path):
    done = load(hub, tmp_path, "--stream", "--source", "sample")
    assert done.returncode == 1
    assert "--stream reads from the hub" in done.stderr


# ---------------------------------------------------------------- any data set of the hub

COMMIT = "a" * 40
CARD = b"""---
configs:
- config_name: books
  data_files:
  - split: train
    path: books/train-*
  - split: test
    path: books/test-*
- config_name: web
  data_files: web/*.jsonl.gz
---
"""


def parquet(texts):
    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"id": list(range(len(texts))), "content": texts}), file)
    return file.getvalue()


BOOKS = [[f"Book {f}, page {i}: " + "word " * (i % 90) for i in range(300)] for f in range(2)]
PAGES = [f"Page {i}: " + "word " * (i % 50) for i in range(500)]


@pytest.fixture
def pages():
    files = {"README.md": CARD, "books/test-0.parquet": parquet(["test"] * 30)}
    files |= {f"books/train-{f}.parquet": parquet(texts) for f, texts in enumerate(BOOKS)}
    lines = "".join(json.dumps({"text": text}) + "\n" for text in PAGES)
    files["web/all.jsonl.gz"] = gzip.compress(lines.encode())
    with serving(Hub(files, "acme/pages", COMMIT)) as server:
        yield server


def prepared(tmp_path, texts):
    """The shards of the same documents from a local file."""
    path = tmp_path / "local.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    prepare([str(path)], tmp_path / "local", vocab_size=600, shard_size=10_000, show_progress=False)
    return shards(tmp_path / "local")


@pytest.mark.parametrize(
    ("words", "texts"),
    [
        (["acme/pages:books", "--text_column", "content"], [*BOOKS[0], *BOOKS[1]]),
        (["acme/pages:web", "--stream"], PAGES),
        (["acme/pages@main:books:test", "--text_column", "content"], ["test"] * 30),
        (["https://huggingface.co/datasets/acme/pages/viewer/web/train?row=2"], PAGES),
        (["hf://datasets/acme/pages/books/train-1.parquet", "--text_column", "content"], BOOKS[1]),
        (["hf://datasets/acme/pages/web", "acme/pages:web"], PAGES + PAGES),
    ],
    ids=["config", "stream", "split", "page", "file", "two"],
)
def test_a_data_set_of_the_hub_gives_the_shards_of_the_same_local_documents(pages, tmp_path, words, texts):
    done = load(pages, tmp_path, "--source", *words)
    assert done.returncode == 0, done.stderr
    assert shards(tmp_path / "out") == prepared(tmp_path, texts)
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert {pin["commit"] for pin in manifest["hub"]} == {COMMIT}


REFUSED = {
    "acme/pages": "acme/pages: has several configurations (books, web); name one: acme/pages:books",
    "acme/pages:films": "acme/pages: no configuration 'films', only books, web; name one of them",
    "acme/pages:web:dev": "acme/pages: no split 'dev' in web, only train; name one: acme/pages:web:train",
    "acme/pages:books": "books/train-0.parquet: no column 'text', only id, content; pass --text_column content",
    "acme/other": "acme/other: the hub has no data set of this name, or it is private, and there is no file",
    "hf://datasets/acme/pages/none": "acme/pages: the hub does not give it (status 404)",
    "hf://acme/pages": "hf://acme/pages: not the address of a data set; give OWNER/NAME[:CONFIG[:SPLIT]]",
}


def test_what_the_hub_does_not_have_is_said_in_one_sentence(pages, tmp_path):
    done = load(pages, tmp_path, *REFUSED, script=LOAD_EACH)
    lines = [line for line in done.stderr.splitlines() if line.startswith("load_fineweb_dataset.py: ")]
    assert "Traceback" not in done.stderr
    assert len(lines) == len(REFUSED), done.stderr
    for line, sentence in zip(lines, REFUSED.values(), strict=True):
        assert sentence in line
    assert done.stdout.splitlines() == ["1"] * len(REFUSED)  # the status of each
    assert not (tmp_path / "out").exists()


def test_a_gated_data_set_names_its_page_and_the_login(pages, tmp_path):
    def gated(handler, number):
        if handler.path != "/":
            handler.answer(401, b"{}", X_Error_Code="GatedRepo")
            return True

    pages.trouble = gated
    done = load(pages, tmp_path, "--source", "acme/pages:web")
    assert done.returncode == 1
    assert "acme/pages: is gated; accept its conditions on http://127.0.0.1" in done.stderr.splitlines()[-1]
    assert "`hf auth login` (or set HF_TOKEN)" in done.stderr.splitlines()[-1]


def test_a_resumed_run_reads_the_commit_that_it_began_with(pages, tmp_path):
    def fail(handler, number):
        if "train-1" in handler.path and handler.path.startswith("/datasets/"):
            handler.answer(403, b"no")
            return True

    words = ("--source", "acme/pages:books", "--text_column", "content", "--shard_size", "5000")
    pages.trouble = fail
    assert load(pages, tmp_path, *words).returncode == 1
    assert json.loads((tmp_path / "out" / "progress.json").read_text())["shards"]
    pages.trouble, pages.newest = None, "b" * 40  # a new commit: its files are not served
    pages.requests.clear()
    done = load(pages, tmp_path, *words)
    assert done.returncode == 0, done.stderr
    assert not any(path == "/api/datasets/acme/pages" for _, path, _ in pages.requests)
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["revision"] == COMMIT


def test_a_filled_cache_needs_no_network(pages, tmp_path):
    words = ("--source", "acme/pages:books", "--text_column", "content")
    assert load(pages, tmp_path, *words).returncode == 0
    whole = shards(tmp_path / "out")
    (tmp_path / "out").rename(tmp_path / "online")
    pages.requests.clear()
    done = load(pages, tmp_path, *words, offline=True)
    assert done.returncode == 0, done.stderr
    assert shards(tmp_path / "out") == whole
    blob = max((tmp_path / "hf" / "hub").rglob("blobs/*"), key=lambda path: path.stat().st_size)
    blob.rename(tmp_path / "blob")
    shutil.rmtree(tmp_path / "out")
    done = load(pages, tmp_path, *words, offline=True)
    assert done.returncode == 1
    message = "acme/pages: a file is not in huggingface_hub's cache, and HF_HUB_OFFLINE is set; unset it"
    assert done.stderr.splitlines()[-1] == f"load_fineweb_dataset.py: {message}"
    for word, sentence in (
        (["acme/pages:books", "--stream"], "--stream needs the network, but HF_HUB_OFFLINE is set"),
        (["acme/other"], "acme/other: not in huggingface_hub's cache, and HF_HUB_OFFLINE is set; unset it"),
    ):
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        done = load(pages, tmp_path, "--source", *word, offline=True)
        assert done.returncode == 1
        assert sentence in done.stderr.splitlines()[-1]
    assert not pages.requests


def test_a_cache_that_another_program_has_filled_needs_no_network(pages, tmp_path):
    script = "import sys, huggingface_hub; huggingface_hub.snapshot_download(*sys.argv[1:2], repo_type='dataset')"
    env = {**os.environ, "HF_ENDPOINT": f"http://127.0.0.1:{pages.server_address[1]}", "NO_PROXY": "*"}
    env |= {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_DISABLE_XET": "1"}
    subprocess.run([sys.executable, "-c", script, "acme/pages"], env=env, check=True, timeout=120)
    done = load(pages, tmp_path, "--source", "acme/pages:web", offline=True)
    assert done.returncode == 0, done.stderr
    assert "taking the 1 files that the cache holds" in done.stderr
    assert shards(tmp_path / "out") == prepared(tmp_path, PAGES)


# ---------------------------------------------------------------- what a word after --source names


@pytest.mark.parametrize(
    ("word", "name"),
    [
        ("acme/pages", DatasetName("acme/pages")),
        ("acme/pages/", DatasetName("acme/pages")),
        ("acme/pages:web", DatasetName("acme/pages", config="web")),
        ("acme/pages:web:test", DatasetName("acme/pages", config="web", split="test")),
        ("acme/pages::test", DatasetName("acme/pages", split="test")),
        ("acme/pages@v1:web", DatasetName("acme/pages", "v1", config="web")),
        ("hf://datasets/acme/pages", DatasetName("acme/pages")),
        (
            "hf://datasets/acme/pages@refs/convert/parquet:web",
            DatasetName("acme/pages", "refs/convert/parquet", config="web"),
        ),
        ("hf://datasets/acme/pages/a/b", DatasetName("acme/pages", folder="a/b")),
        ("https://huggingface.co/datasets/acme/pages", DatasetName("acme/pages")),
        ("https://huggingface.co/datasets/acme/pages/tree/main", DatasetName("acme/pages", "main")),
        ("https://huggingface.co/datasets/acme/pages/blob/v1/a/b.csv", DatasetName("acme/pages", "v1", "a/b.csv")),
        (
            "https://hf.co/datasets/acme/pages/viewer/my%20web/test?p=1",
            DatasetName("acme/pages", config="my web", split="test"),
        ),
        ("https://huggingface.co/datasets/acme/pages/raw/main/a.csv", DatasetName("acme/pages", "main", "a.csv")),
        (
            "https://huggingface.co/datasets/acme/pages/tree/refs%2Fpr%2F1/web",
            DatasetName("acme/pages", "refs/pr/1", "web"),
        ),
        ("https://www.kaggle.com/datasets/acme/pages", None),
        ("https://huggingface.co/acme/model", None),
        ("https://huggingface.co/datasets/acme/pages/discussions", None),
        ("hf://datasets/acme/pages/a:web", None),
        ("hf://acme/pages", None),
        ("acme", None),
        ("a/b/c", None),
        ("acme/pages:web:test:more", None),
    ],
)
def test_names_and_addresses_of_data_sets(word, name):
    assert parse_name(word) == name


@pytest.fixture
def corpus(tmp_path, monkeypatch):
    """A folder of files in a working directory of its own."""
    monkeypatch.chdir(tmp_path)
    for name in ("texts/b.txt", "texts/sub/a.JSONL", "texts/c.csv.gz", "texts/.hidden.txt", "texts/.git/x.txt",
                 "texts/notes.md", "texts/state.json", "more/d.txt", "acme/pages"):  # fmt: skip
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text("text")
    return tmp_path


@pytest.mark.parametrize(
    ("words", "paths"),
    [
        (["texts"], ["texts/b.txt", "texts/c.csv.gz", "texts/sub/a.JSONL"]),
        (["texts/"], ["texts/b.txt", "texts/c.csv.gz", "texts/sub/a.JSONL"]),
        (["*/*.txt"], ["more/d.txt", "texts/b.txt"]),
        (["texts/**/*.JSONL"], ["texts/sub/a.JSONL"]),
        (["more/d.txt", "texts/b.txt"], ["more/d.txt", "texts/b.txt"]),
        (["more", "texts/b.txt"], ["more/d.txt", "texts/b.txt"]),
    ],
)
def test_folders_and_globs_hold_the_files_that_can_be_read_sorted_by_path(corpus, words, paths):
    (part,) = open_source(words).parts
    assert [path.as_posix() for path in part.paths] == paths


@pytest.mark.parametrize(
    ("word", "sentence"),
    [
        ("acme/pages", "acme/pages: unknown format; give files that end in .jsonl, "),  # a path wins over a name
        ("texts/notes.md", "texts/notes.md: unknown format"),
        ("texts/.git", "texts/.git: holds no file that ends in "),
        ("texts/*.parquet", "texts/*.parquet: holds no file that ends in "),
        ("none.txt", "none.txt: no such file or folder"),
        ("none/x.jsonl", "none/x.jsonl: no such file or folder"),
        ("./none/x", "./none/x: no such file or folder"),
    ],
)
def test_a_word_that_names_nothing_to_read_is_refused(corpus, word, sentence):
    if word == "texts/.git":
        Path("texts/.git/x.txt").rename("texts/.git/.x.txt")
    with pytest.raises(SourceError) as error:
        open_source([word])
    assert str(error.value).startswith(sentence)


def test_a_separator_without_a_text_file_is_refused(corpus):
    with pytest.raises(SourceError, match=r"--document_separator divides \.txt files"):
        check_flags([open_source(["texts/c.csv.gz"], ReadOptions(document_separator="---"))], False)
    both = [open_source([word], ReadOptions(document_separator="---")) for word in ("texts/c.csv.gz", "more/d.txt")]
    check_flags(both, False)


def test_the_name_of_many_files_is_short(tmp_path):
    paths = [tmp_path / f"{i}.txt" for i in range(1500)]
    for path in paths:
        path.write_text("text")
    assert len(open_source([str(path) for path in paths]).name) < 300
