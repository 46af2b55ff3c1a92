"""HellaSwag's validation split, downloaded and verified; or, offline, a small file in its format.

    python load_hellaswag_dataset.py             10,042 rows into data/hellaswag/hellaswag_val.jsonl
    python load_hellaswag_dataset.py --sample    200 rows from held-out documents of the sample corpus

HellaSwag (Zellers et al., arXiv 1905.07830): a context and four endings, of which one is true and three were
written by a machine to fool machines.
"""

import argparse
import json
import re
import sys
from pathlib import Path

import numpy as np
import requests
from tqdm import tqdm

from dataloaders import TokenStream
from files import atomic_write, sha256_of
from load_fineweb_dataset import SAMPLE_ROOT, SAMPLE_VOCAB_SIZE, prepare
from sources import SourceError
from tokenizer import Tokenizer

URL = "https://raw.githubusercontent.com/rowanz/hellaswag/master/data/hellaswag_val.jsonl"
NUM_ROWS = 10_042
SHA256 = "0aa3b88843990f3f10a97b9575c94d7b71fb2205240ba04ae4884d9e9c992588"
FILE_NAME = "hellaswag_val.jsonl"
SAMPLE_FILE_NAME = "sample_continuations.jsonl"
SAMPLE_ROWS = 200


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
    """Fetch the validation split into `out_dir`, unless it is there and whole; return its path.

    Raises:
        SourceError: it cannot be had, or what came is not it; then nothing is left in `out_dir`.
    """
    path = Path(out_dir) / FILE_NAME
    if path.is_file():
        try:
            verify(path, **expected)
            return path
        except ValueError as error:
            print(f"{path}: {error}; fetching it again")
    try:
        with requests.get(url, stream=True, timeout=30) as response:
            response.raise_for_status()
            size = int(response.headers.get("Content-Length", 0)) or None
            with (
                atomic_write(path) as file,
                tqdm(total=size, unit="B", unit_scale=True, desc=FILE_NAME) as progress,
            ):
                for block in response.iter_content(2**16):
                    progress.update(file.write(block))
                file.flush()
                verify(Path(file.name), **expected)  # before it takes its name
    except requests.RequestException as error:
        raise SourceError(
            f"{url}: could not be fetched ({_cause(error)}); check the network, run this again"
        ) from error
    except ValueError as error:
        raise SourceError(f"{url}: what came is not HellaSwag: {error}; run this again") from error
    finally:
        if path.parent.is_dir() and not any(path.parent.iterdir()):
            path.parent.rmdir()
    return path


def _cause(error: requests.RequestException) -> str:
    return f"status {error.response.status_code}" if error.response is not None else type(error).__name__


def write_sample(data_root: str | Path, path: str | Path, vocab_size: int = SAMPLE_VOCAB_SIZE) -> None:
    """Write rows in HellaSwag's format from the validation shard of the prepared sample corpus into `path`.

    A row's context is a stretch of source of up to 300 characters; the true ending is the 50 to 80 that follow; the
    three others follow other contexts of the held-out documents. The same corpus, the same rows.
    """
    tokenizer = Tokenizer(vocab_size=vocab_size)
    stream = TokenStream(data_root, "val", vocab_size=vocab_size, fingerprint=tokenizer.fingerprint)
    ids = stream.read(0, len(stream))
    begins, ends = np.flatnonzero(ids == tokenizer.bos_id), np.flatnonzero(ids == tokenizer.eos_id)
    documents = [tokenizer.decode(ids[b + 1 : e].tolist()) for b, e in zip(begins, ends, strict=False)]

    pairs = []  # (context, what follows), cut at a space between two words
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
        print("load_hellaswag_dataset.py: stopped; nothing was left behind", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
