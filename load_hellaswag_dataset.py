"""HellaSwag's validation split, downloaded and verified; or, offline, a small file in its format.

    python load_hellaswag_dataset.py             10,042 rows into data/hellaswag/hellaswag_val.jsonl
    python load_hellaswag_dataset.py --sample    200 rows from held-out documents of the sample corpus

A row of HellaSwag (Zellers et al., arXiv 1905.07830) has a context and four endings. One ending is true. A machine
wrote the other three, to fool machines.
"""

import argparse
import json
import re
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import requests
from requests.adapters import HTTPAdapter
from tqdm import tqdm
from urllib3.util import Retry

from files import atomic_write, sha256_of
from load_fineweb_dataset import SAMPLE_ROOT, SAMPLE_VOCAB_SIZE, prepare
from shards import TokenStream
from sources import SourceError
from tokenizer import Tokenizer

URL = "https://raw.githubusercontent.com/rowanz/hellaswag/master/data/hellaswag_val.jsonl"
NUM_ROWS = 10_042
SHA256 = "0aa3b88843990f3f10a97b9575c94d7b71fb2205240ba04ae4884d9e9c992588"
FILE_NAME = "hellaswag_val.jsonl"
SAMPLE_FILE_NAME = "sample_continuations.jsonl"
SAMPLE_ROWS = 200

RETRY_SECONDS = (1, 2, 4, 8)  # pauses between attempts that bring nothing new
TIMEOUT_SECONDS = 30  # without a byte
BLOCK_BYTES = 2**16  # written at once; a connection that breaks loses at most this much


def verify(path: Path, *, num_rows: int = NUM_ROWS, sha256: str = SHA256) -> None:
    """Raises ValueError unless `path` holds HellaSwag's validation split, whole and unchanged."""
    rows = 0
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                json.loads(line)["endings"]
            except (ValueError, KeyError, TypeError):
                raise ValueError(f"line {number} is no HellaSwag row (an error page, or cut short?)") from None
            rows += 1
    if rows != num_rows:
        raise ValueError(f"it has {rows:,} rows instead of {num_rows:,}")
    if sha256_of(path) != sha256:
        raise ValueError(f"its sha256 is not {sha256[:12]}...")


def download(out_dir: str | Path, url: str = URL, **expected) -> Path:
    """Fetch the validation split into `out_dir`, unless it is there and whole. Return its path.

    If a connection breaks or the process is killed, what has come stays in a `.part` file and is not fetched again.

    Raises:
        SourceError: it could not be fetched, or what came is something else and was deleted.
    """
    path = Path(out_dir) / FILE_NAME
    part = path.with_name(f"{FILE_NAME}.part")
    if path.is_file():
        try:
            verify(path, **expected)
            return path
        except ValueError as error:
            print(f"{path}: {error}; fetching it again")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        _fetch(url, part)
        try:
            verify(part, **expected)
            with open(part, "rb") as whole, atomic_write(path) as file:
                shutil.copyfileobj(whole, file)
        finally:
            part.unlink()  # it was copied, or it is not HellaSwag
    except requests.RequestException as error:
        cause = f"status {error.response.status_code}" if error.response is not None else type(error).__name__
        raise SourceError(f"{url}: could not be fetched ({cause}); check the network, run this again") from error
    except ValueError as error:
        raise SourceError(f"{url}: what came is not HellaSwag: {error}; run this again") from error
    finally:
        if not any(path.parent.iterdir()):
            path.parent.rmdir()
    return path


def _fetch(url: str, part: Path) -> None:
    """Download into `part`, after what is there already. Raises requests.RequestException when retries do not help."""
    # urllib3 waits as a Retry-After header asks. We handle broken connections: urllib3 would begin the file anew.
    busy = Retry(total=5, connect=0, read=0, other=0, backoff_factor=1, status_forcelist=(429, 500, 502, 503, 504))
    busy.raise_on_status = False  # return the last answer instead of raising
    with requests.Session() as session:
        session.mount(url, HTTPAdapter(max_retries=busy))
        most, pauses = 0, iter(RETRY_SECONDS)
        while True:
            have = part.stat().st_size if part.is_file() else 0
            # The range counts uncompressed bytes, so ask for no compression.
            headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={have}-"} if have else {})
            try:
                with session.get(url, headers=headers, stream=True, timeout=TIMEOUT_SECONDS) as response:
                    goes_on = response.headers.get("Content-Range", "").startswith(f"bytes {have}-")
                    if have and (response.status_code == 416 or (response.status_code == 206 and not goes_on)):
                        part.unlink()  # the server's file does not begin like this
                        continue
                    response.raise_for_status()
                    length = int(response.headers.get("Content-Length", 0))
                    with (
                        open(part, "ab" if have and goes_on else "wb", buffering=0) as file,
                        tqdm(initial=file.tell(), total=file.tell() + length, unit="B", unit_scale=True) as progress,
                    ):
                        for block in response.iter_content(BLOCK_BYTES):
                            progress.update(file.write(block))
                return
            except requests.HTTPError:
                raise
            except requests.RequestException as error:
                size = part.stat().st_size if part.is_file() else 0
                if size > most:
                    most, pauses = size, iter(RETRY_SECONDS)
                pause = next(pauses, None)
                if pause is None or not size:  # nothing has come yet, so the user can simply start again
                    raise
                print(f"{url}: broke off ({type(error).__name__}); going on in {pause} s", file=sys.stderr)
                time.sleep(pause)


def write_sample(data_root: str | Path, path: str | Path, vocab_size: int = SAMPLE_VOCAB_SIZE) -> None:
    """Write rows in HellaSwag's format from the validation shard of the prepared sample corpus into `path`.

    A row's context is up to 300 characters of source. Its true ending is the 50 to 80 characters that follow. The three
    other endings follow other contexts of the held-out documents. The same corpus gives the same rows.
    """
    tokenizer = Tokenizer(vocab_size=vocab_size)
    stream = TokenStream(data_root, "val", vocab_size=vocab_size, fingerprint=tokenizer.fingerprint)
    ids = stream.read(0, len(stream))
    begins, ends = np.flatnonzero(ids == tokenizer.bos_id), np.flatnonzero(ids == tokenizer.eos_id)
    documents = [tokenizer.decode(ids[b + 1 : e].tolist()) for b, e in zip(begins, ends, strict=False)]

    pairs = []  # (context, ending), cut at a space between two words
    for document in documents:
        for cut in re.finditer(r"(?<=\S) (?=\S)", document):
            context = document[max(0, cut.start() - 300) : cut.start()].partition("\n")[2]
            ending = document[cut.end() : cut.end() + 80].rpartition(" ")[0].rstrip()
            if len(context) >= 150 and len(ending) >= 50:
                pairs.append((context, ending))
    rng = np.random.default_rng(0)
    pairs = [pairs[i] for i in rng.choice(len(pairs), size=SAMPLE_ROWS, replace=False)]
    with atomic_write(path, "w") as file:
        for i, (context, ending) in enumerate(pairs):
            others = rng.choice(np.delete(np.arange(len(pairs)), i), size=3, replace=False)
            endings, label = [pairs[j][1] for j in others], int(rng.integers(4))
            endings.insert(label, ending)
            row = {"ind": i, "activity_label": "Python source", "ctx_a": context, "ctx_b": "", "ctx": context}
            row |= {"endings": endings, "label": label}
            row |= {"split": "val", "split_type": "sample", "source_id": f"sample~{i}"}
            file.write(json.dumps(row) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out_dir", help="folder for the file (default: data/hellaswag; the sample: data/sample)")
    parser.add_argument("--sample", action="store_true", help="write the offline sample instead; needs no network")
    args = parser.parse_args()
    try:
        if args.sample:
            prepare(["sample"], SAMPLE_ROOT, vocab_size=SAMPLE_VOCAB_SIZE)
            path = Path(args.out_dir or SAMPLE_ROOT) / SAMPLE_FILE_NAME
            write_sample(SAMPLE_ROOT, path)
            print(f"{path}: {SAMPLE_ROWS} rows in HellaSwag's format from the sample corpus; not HellaSwag")
        else:
            path = download(args.out_dir or "data/hellaswag")
            print(f"{path}: {NUM_ROWS:,} rows, verified")
    except (SourceError, ValueError, OSError) as error:
        print(f"load_hellaswag_dataset.py: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("load_hellaswag_dataset.py: stopped; the same command goes on after what has come", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
