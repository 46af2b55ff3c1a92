import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

import load_hellaswag_dataset
from hellaswag_utils import iterate_rows
from load_fineweb_dataset import SAMPLE_VOCAB_SIZE, prepare
from load_hellaswag_dataset import download, write_sample
from sources import SourceError
from tokenizer import Tokenizer

ROWS = [{"ctx": f"context {i}", "endings": ["a", "b", "c", "d"], "label": i % 4} for i in range(5)]
LINES = [json.dumps(row).encode() + b"\n" for row in ROWS]
CONTENT = b"".join(LINES)
EXPECTED = {"num_rows": 5, "sha256": hashlib.sha256(CONTENT).hexdigest()}
FILE_NAME = "hellaswag_val.jsonl"


class Server:
    """A web server on this machine that answers every request as it is told to, and counts them."""

    def __init__(self):
        self.status, self.body, self.length, self.requests = 200, CONTENT, None, 0
        self.ranges, self.answers = [], []  # what was asked for; functions that answer the next requests
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                server.requests += 1
                server.ranges.append(self.headers.get("Range"))
                if server.answers:
                    return server.answers.pop(0)(self)
                self.send(server.status, server.body, Content_Length=server.length or len(server.body))

            def send(self, status, body, **headers):
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name.replace("_", "-"), str(value))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *args): ...

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/{FILE_NAME}"
        self.thread = threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.01})
        self.thread.start()

    def close(self):
        self.http.shutdown()
        self.thread.join()
        self.http.server_close()


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(load_hellaswag_dataset, "RETRY_SECONDS", (0, 0))
    monkeypatch.setattr(load_hellaswag_dataset, "BLOCK_BYTES", 1)
    server = Server()
    yield server
    server.close()


# ---------------------------------------------------------------- the download


def test_the_right_file_is_stored_unchanged(server, tmp_path):
    path = download(tmp_path / "a" / "out", url=server.url, **EXPECTED)
    assert path == tmp_path / "a" / "out" / FILE_NAME
    assert path.read_bytes() == CONTENT
    assert os.listdir(path.parent) == [FILE_NAME]


def no_such_page(server):
    server.status, server.body = 404, b"404: Not Found"


def refused(server):
    server.status, server.body = 403, CONTENT


def page_of_html(server):  # a captive portal's: it says 200
    server.body = b"<!DOCTYPE html>\n<html><body>Please log in</body></html>\n"


def empty(server):
    server.body = b""


def half_a_row_in_full_length(server):  # the server itself holds half a file
    server.body = CONTENT[:-10]


def too_few_rows(server):
    server.body = b"".join(LINES[:4])


def too_many_rows(server):
    server.body = CONTENT + LINES[0]


def one_letter_different(server):
    server.body = CONTENT.replace(b"context 3", b"context 8")


def another_json(server):
    server.body = b'{"message": "rate limit exceeded"}\n'


FAULTS = [
    (no_such_page, "status 404"),
    (refused, "status 403"),
    (page_of_html, "line 1 is no HellaSwag row"),
    (empty, "0 rows instead of 5"),
    (half_a_row_in_full_length, "line 5 is no HellaSwag row"),
    (too_few_rows, "4 rows instead of 5"),
    (too_many_rows, "6 rows instead of 5"),
    (one_letter_different, f"sha256 is not {EXPECTED['sha256'][:12]}"),
    (another_json, "line 1 is no HellaSwag row"),
]


@pytest.mark.parametrize(("fault", "message"), FAULTS)
def test_anything_else_is_refused_and_nothing_left_behind(server, tmp_path, fault, message):
    fault(server)
    with pytest.raises(SourceError) as error:
        download(tmp_path / "out", url=server.url, **EXPECTED)
    assert str(error.value).startswith(f"{server.url}: ")
    assert message in str(error.value)
    assert str(error.value).endswith("run this again")
    assert not (tmp_path / "out").exists()


def test_no_server_is_refused_and_nothing_left_behind(tmp_path, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with pytest.raises(SourceError, match=r"could not be fetched .*; check the network, run this again"):
        download(tmp_path / "out", url="http://127.0.0.1:9/", **EXPECTED)  # a port where nobody listens
    assert not (tmp_path / "out").exists()


def test_a_good_file_is_not_fetched_again(server, tmp_path):
    for _ in range(3):
        download(tmp_path, url=server.url, **EXPECTED)
    assert server.requests == 1


@pytest.mark.parametrize("old", [b"", LINES[0], CONTENT[:-10], CONTENT.replace(b"3", b"8"), b"<html>\n", b"\xff\n"])
def test_a_bad_file_is_replaced(server, tmp_path, old):
    (tmp_path / FILE_NAME).write_bytes(old)
    path = download(tmp_path, url=server.url, **EXPECTED)
    assert path.read_bytes() == CONTENT
    assert server.requests == 1
    assert os.listdir(tmp_path) == [FILE_NAME]


@pytest.mark.parametrize(("fault", "message"), FAULTS)
def test_a_bad_file_and_its_neighbours_are_kept_where_the_new_one_is_no_better(server, tmp_path, fault, message):
    fault(server)
    (tmp_path / FILE_NAME).write_bytes(LINES[0])
    (tmp_path / "neighbour").write_bytes(b"mine")
    with pytest.raises(SourceError):
        download(tmp_path, url=server.url, **EXPECTED)
    assert sorted(os.listdir(tmp_path)) == [FILE_NAME, "neighbour"]
    assert (tmp_path / FILE_NAME).read_bytes() == LINES[0]


def test_the_command_wants_all_of_hellaswag_and_fails_in_one_sentence(tmp_path, monkeypatch, capsys):
    # A proxy that is not there: nothing leaves the machine, whatever network it has.
    for name in ("NO_PROXY", "no_proxy", "ALL_PROXY", "all_proxy", "https_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")
    (tmp_path / FILE_NAME).write_bytes(CONTENT)  # good rows, but not those of HellaSwag
    monkeypatch.setattr(sys, "argv", ["load_hellaswag_dataset.py", "--out_dir", str(tmp_path)])
    assert load_hellaswag_dataset.main() == 1
    captured = capsys.readouterr()
    assert "it has 5 rows instead of 10,042; fetching it again" in captured.out
    (line,) = captured.err.splitlines()
    assert line.startswith("load_hellaswag_dataset.py: https://raw.githubusercontent.com/rowanz/hellaswag/")
    assert line.endswith("check the network, run this again")
    assert (tmp_path / FILE_NAME).read_bytes() == CONTENT


# ---------------------------------------------------------------- broken off, and gone on with

HALF = len(CONTENT) // 2


def first_half(handler):
    handler.send(200, CONTENT[:HALF], Content_Length=len(CONTENT))


def rest(handler):
    start = int(handler.headers["Range"].removeprefix("bytes=").rstrip("-"))
    content_range = f"bytes {start}-{len(CONTENT) - 1}/{len(CONTENT)}"
    handler.send(206, CONTENT[start:], Content_Length=len(CONTENT) - start, Content_Range=content_range)


def stall(handler):
    first_half(handler)
    handler.wfile.flush()
    time.sleep(1)


def another_range(handler):
    handler.send(206, CONTENT[:HALF], Content_Length=HALF, Content_Range=f"bytes 0-{HALF - 1}/{len(CONTENT)}")


def no_such_range(handler):
    handler.send(416, b"", Content_Length=0, Content_Range=f"bytes */{len(CONTENT)}")


def whole(handler):
    handler.send(200, CONTENT, Content_Length=len(CONTENT))


def a_few_more_bytes(handler):
    start = int(handler.headers["Range"].removeprefix("bytes=").rstrip("-"))
    content_range = f"bytes {start}-{len(CONTENT) - 1}/{len(CONTENT)}"
    size = len(CONTENT) - start
    handler.send(206, CONTENT[start : start + 10], Content_Length=size, Content_Range=content_range)


@pytest.mark.parametrize(
    ("answers", "ranges"),
    [
        ([first_half, rest], [None, f"bytes={HALF}-"]),
        ([stall, rest], [None, f"bytes={HALF}-"]),
        ([first_half, whole], [None, f"bytes={HALF}-"]),  # a server that knows no ranges
        ([first_half, another_range, whole], [None, f"bytes={HALF}-", None]),
        ([first_half, no_such_range, whole], [None, f"bytes={HALF}-", None]),
        (
            [first_half, *[a_few_more_bytes] * 6, rest],  # more often than it asks in vain
            [None, *[f"bytes={HALF + 10 * i}-" for i in range(7)]],
        ),
    ],
)
def test_a_broken_connection_is_gone_on_with_by_range(server, tmp_path, monkeypatch, answers, ranges):
    monkeypatch.setattr(load_hellaswag_dataset, "TIMEOUT_SECONDS", 0.3)
    server.answers = list(answers)
    assert download(tmp_path, url=server.url, **EXPECTED).read_bytes() == CONTENT
    assert server.ranges == ranges
    assert os.listdir(tmp_path) == [FILE_NAME]


def test_a_server_that_never_sends_the_rest_is_given_up_and_the_next_run_goes_on(server, tmp_path):
    server.body, server.length = CONTENT[:HALF], len(CONTENT)
    with pytest.raises(SourceError, match=r"could not be fetched .*; check the network, run this again"):
        download(tmp_path, url=server.url, **EXPECTED)
    assert os.listdir(tmp_path) == [f"{FILE_NAME}.part"]
    assert server.requests == 3  # and after each of two pauses
    server.answers, server.ranges = [rest], []
    assert download(tmp_path, url=server.url, **EXPECTED).read_bytes() == CONTENT
    assert server.ranges == [f"bytes={HALF}-"]


@pytest.mark.parametrize("status", [429, 503])
def test_a_busy_server_is_asked_again_when_it_says(server, tmp_path, status):
    times = []

    def busy(handler):
        times.append(time.monotonic())
        handler.send(status, b"", Content_Length=0, Retry_After=1)

    def after(handler):
        times.append(time.monotonic())
        whole(handler)

    server.answers = [busy, after]
    assert download(tmp_path, url=server.url, **EXPECTED).read_bytes() == CONTENT
    assert times[1] - times[0] >= 1


def test_a_part_of_something_else_is_thrown_away_with_what_followed(server, tmp_path):
    (tmp_path / f"{FILE_NAME}.part").write_bytes(b"x" * HALF)
    server.answers = [rest]
    with pytest.raises(SourceError, match="what came is not HellaSwag"):
        download(tmp_path, url=server.url, **EXPECTED)
    assert not tmp_path.exists()
    assert download(tmp_path, url=server.url, **EXPECTED).read_bytes() == CONTENT


FETCH = """
import sys
import load_hellaswag_dataset

load_hellaswag_dataset.download.__defaults__ = (sys.argv.pop(1),)
load_hellaswag_dataset.BLOCK_BYTES = 1
sys.exit(load_hellaswag_dataset.main())
"""


@pytest.mark.skipif(os.name != "posix", reason="no SIGKILL")
@pytest.mark.parametrize(("number", "status"), [(signal.SIGKILL, -9), (signal.SIGINT, 130)])
def test_after_a_kill_or_ctrl_c_the_next_run_goes_on(server, tmp_path, number, status):
    def half_and_signal(handler):
        first_half(handler)
        handler.wfile.flush()
        time.sleep(0.3)  # until it is in the file
        process.send_signal(number)
        process.wait()

    server.answers = [half_and_signal]
    env = {**os.environ, "PYTHONPATH": os.path.dirname(load_hellaswag_dataset.__file__), "NO_PROXY": "127.0.0.1"}
    command = [sys.executable, "-c", FETCH, server.url, "--out_dir", str(tmp_path / "out")]
    process = subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True)
    error = process.communicate(timeout=60)[1]
    assert process.returncode == status
    assert "Traceback" not in error
    assert number == signal.SIGKILL or "stopped; the same command goes on after what has come" in error
    assert (tmp_path / "out" / f"{FILE_NAME}.part").read_bytes() == CONTENT[:HALF]
    server.answers, server.ranges = [rest], []
    assert download(tmp_path / "out", url=server.url, **EXPECTED).read_bytes() == CONTENT
    assert server.ranges == [f"bytes={HALF}-"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no device that is always full")
def test_a_full_disk_is_one_sentence(server, tmp_path, monkeypatch, capsys):
    (tmp_path / f"{FILE_NAME}.part").symlink_to("/dev/full")
    monkeypatch.setattr(download, "__defaults__", (server.url,))
    monkeypatch.setattr(sys, "argv", ["load_hellaswag_dataset.py", "--out_dir", str(tmp_path)])
    assert load_hellaswag_dataset.main() == 1
    assert "No space left on device" in capsys.readouterr().err.splitlines()[-1]


def test_the_pins_are_those_of_hellaswag():
    assert load_hellaswag_dataset.NUM_ROWS == 10_042
    assert load_hellaswag_dataset.SHA256 == "0aa3b88843990f3f10a97b9575c94d7b71fb2205240ba04ae4884d9e9c992588"


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
    """The text of the validation shard, the last document cut where the shard ends."""
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
    # 50 of each place on average, with a standard deviation of 6: an eye on the shuffle, not on its luck.
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


def test_length_alone_does_not_give_the_true_ending_away(rows):
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
