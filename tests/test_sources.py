"""Reading from the hub. A server on this machine plays the hub. The client is the real one, in its own process."""

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from hub_server import Hub

from files import check_free_space
from load_fineweb_dataset import prepare
from sources import FINEWEB, FINEWEB_FOLDER, FINEWEB_REVISION

REPO = Path(__file__).resolve().parents[1]
NUM_FILES, NUM_DOCUMENTS = 3, 700
TEXTS = [[f"File {f}, page {i}: " + "word " * (i % 90) for i in range(NUM_DOCUMENTS)] for f in range(NUM_FILES)]
PATHS = [f"{FINEWEB_FOLDER}/{i:03d}_00000.parquet" for i in range(NUM_FILES)]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Path on the hub -> bytes of a parquet file with several row groups."""
    folder, files = tmp_path_factory.mktemp("files"), {}
    for path, texts in zip(PATHS, TEXTS, strict=True):
        table = pyarrow.table({"id": [str(i) for i in range(len(texts))], "text": texts})
        pyarrow.parquet.write_table(table, folder / "file", row_group_size=150, compression="none")
        files[path] = (folder / "file").read_bytes()
    return files


@pytest.fixture
def hub(files):
    server = Hub(files, FINEWEB, FINEWEB_REVISION, FINEWEB_FOLDER)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


LOAD = """
import sys
import huggingface_hub.constants
import load_fineweb_dataset, sources

huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE = 1000  # the default, ten million, is more than these files have
sources.RETRY_SECONDS = (0.1, 0.1, 0.1)
sources.STREAM_BLOCK = 20_000  # several requests a file

if __name__ == "__main__":
    sys.exit(load_fineweb_dataset.main())
"""


def load(hub, tmp_path, *flags, **options):
    """Run the command in a process of its own that can reach only this hub."""
    (tmp_path / "script.py").write_text(LOAD)
    env = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
    env |= {"HF_ENDPOINT": f"http://127.0.0.1:{hub.server_address[1]}", "HF_HOME": str(tmp_path / "hf")}
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
    assert (manifest["source"], manifest["revision"]) == (f"{FINEWEB} {FINEWEB_FOLDER}", FINEWEB_REVISION)
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
    assert f"could not read {FINEWEB} (status 403)" in done.stderr.splitlines()[-1]
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
            headers = {"ETag": f'"{hashlib.sha256(body).hexdigest()}"', "X_Repo_Commit": FINEWEB_REVISION}
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
    needed = NUM_FILES * 10**18 + sum(map(len, hub.files.values())) + 15_000_000_000 * 2
    assert f"needs {needed:,} bytes, and the disk has " in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert not any("/resolve/" in path for _, path, _ in hub.requests)
    assert not (tmp_path / "out").exists()
    done = load(hub, tmp_path, "--max_tokens", "1000")  # in the first file, but two more are read ahead
    assert f"needs {needed - 15_000_000_000 * 2 + 1000 * 2:,} bytes, and " in done.stderr.splitlines()[-1]
    hub.wrong_size = 0
    done = load(hub, tmp_path, "--max_tokens", "1000")
    assert done.returncode == 0, done.stderr  # now there is room


def test_a_disk_needs_room_for_the_sum_of_all_that_goes_there(tmp_path):
    import shutil

    free = shutil.disk_usage(tmp_path).free
    check_free_space([(tmp_path / "a", free // 2)])
    with pytest.raises(OSError, match="make room"):
        check_free_space([(tmp_path / "a" / "b", free // 3 * 2), (tmp_path / "c", free // 3 * 2)])


def test_stream_is_refused_if_the_source_is_not_the_hub(hub, tmp_path):
    done = load(hub, tmp_path, "--stream", "--source", "sample")
    assert done.returncode == 1
    assert "--stream reads from the hub" in done.stderr
