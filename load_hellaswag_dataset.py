"""Fetch and verify HellaSwag's validation split. Or, without a network, write a small file in its format.

    python load_hellaswag_dataset.py                 10,042 rows into data/hellaswag/hellaswag_val.jsonl
    python load_hellaswag_dataset.py --from FILE     the same rows from a local copy of the old or the hub's file
    python load_hellaswag_dataset.py --sample        200 rows from held-out documents of the sample corpus

A row of HellaSwag (Zellers et al., arXiv 1905.07830) has a context and four endings. One ending is true. A language
model wrote the other three, and the authors selected them to fool models. HellaSwag's own repository was closed in
September 2026, so the rows come from the Hugging Face hub. The script writes their sha256 into a file beside them. The
next run compares it, and so notices a change.
"""

import json
import os
import re
import sys
from pathlib import Path

import numpy as np

from command_line import SWITCH, FlagParser
from files import allow_any_text_in_output, atomic_write, sha256_of
from hub import GONE, error_reason, http_status, reach_hub
from load_fineweb_dataset import SAMPLE_ROOT, SAMPLE_VOCAB_SIZE
from preparation import prepare
from rows import SourceError
from shards import TokenStream
from tokenizer import Tokenizer

REPOSITORY = "Rowan/hellaswag"
REVISION = "218ec52e09a7e7462a5400043bb9a69a41d06b76"
HUB_FILE = "data/validation-00000-of-00001.parquet"
HUB_SHA256 = "899813071e1e95efafec90f856e1987d2150fa4d020fc005df6962c259f660cd"
OLD_SHA256 = "0aa3b88843990f3f10a97b9575c94d7b71fb2205240ba04ae4884d9e9c992588"  # of hellaswag_val.jsonl on GitHub
NUM_ROWS = 10_042
FILE_NAME = "hellaswag_val.jsonl"
SAMPLE_FILE_NAME = "sample_continuations.jsonl"
SAMPLE_ROWS = 200


# ---------------------------------------------------------------- HellaSwag


def download(out_dir: str | Path, source: str | Path | None = None) -> Path:
    """Write the validation split into `out_dir`, unless it is there and unchanged. Return the path of the file.

    Args:
        source: a local copy of the hub's parquet file or of the old `hellaswag_val.jsonl`. None: fetch from the hub.

    Raises:
        SourceError: the file could not be fetched, or it is not HellaSwag's validation split.
        OSError: the disk is full or read-only.
    """
    path = Path(out_dir) / FILE_NAME
    digest_file = path.with_name(f"{FILE_NAME}.sha256")
    if path.is_file():
        # Without a digest file only the old file is accepted: the user may have put it there.
        expected = digest_file.read_text().split()[:1] if digest_file.is_file() else [OLD_SHA256]
        if expected == [sha256_of(path)]:
            return path
        print(f"{path}: changed since it was written, or not HellaSwag; writing it again")
    rows = read_rows(fetch() if source is None else Path(source))
    with atomic_write(path, "w") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    with atomic_write(digest_file, "w") as file:
        file.write(f"{sha256_of(path)}  {FILE_NAME}\n")  # the format that `sha256sum -c` reads
    return path


def read_rows(path: Path) -> list[dict]:
    """The rows of a local copy of the hub's file or of the old file.

    The labels of the hub's file are strings. They become ints, so both files give the same rows.

    Raises:
        SourceError: the file is missing, or its sha256 is neither HUB_SHA256 nor OLD_SHA256.
    """
    if not path.is_file():
        raise SourceError(f"{path}: no such file; give a copy of {FILE_NAME} or of the hub's {Path(HUB_FILE).name}")
    found = sha256_of(path)
    if found == HUB_SHA256:
        import pyarrow.parquet  # here, not above: the import is slow

        rows = pyarrow.parquet.read_table(path).to_pylist()
    elif found == OLD_SHA256:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    else:
        raise SourceError(
            f"{path}: not HellaSwag's validation split (its sha256 is {found[:12]}..., not {HUB_SHA256[:12]}... of the "
            f"hub's file or {OLD_SHA256[:12]}... of the old one); give an unchanged copy"
        )
    if len(rows) != NUM_ROWS:
        raise SourceError(f"{path}: has {len(rows):,} rows instead of {NUM_ROWS:,}; give an unchanged copy")
    return [row | {"label": int(row["label"])} for row in rows]


def fetch() -> Path:
    """Download the hub's file into huggingface_hub's cache, unless it is there. Return its path.

    huggingface_hub retries and resumes a broken download. With a filled cache no network is needed.

    Raises:
        SourceError: the hub no longer has the file, cannot be reached, or sent another file.
        OSError: the disk is full or read-only.
    """
    import huggingface_hub

    file = {"repo_id": REPOSITORY, "filename": HUB_FILE, "repo_type": "dataset", "revision": REVISION}
    cached = huggingface_hub.try_to_load_from_cache(**file)
    try:
        if not isinstance(cached, str):
            reach_hub()
            cached = huggingface_hub.hf_hub_download(**file)
    except Exception as error:  # huggingface_hub, httpx and requests have no common error class
        if getattr(error, "errno", None) is not None:  # the disk is full or read-only
            raise
        raise SourceError(_failure(error)) from error
    if sha256_of(cached) != HUB_SHA256:
        os.remove(os.path.realpath(cached))  # `cached` may be a link: remove the file itself
        raise SourceError(f"{REPOSITORY}: what the hub sent is not HellaSwag (another sha256); run this again")
    return Path(cached)


def _failure(error: Exception) -> str:
    """The message for a failed download. It says whether the file or the network is gone, and names the cure."""
    status = http_status(error)
    if status in GONE:
        return (
            f"{REPOSITORY}: the hub no longer gives this file (status {status}); pass --from FILE with a copy of "
            f"{FILE_NAME}, or --sample for the offline sample"
        )
    return (
        f"{REPOSITORY}: the hub could not be reached ({error_reason(error)}); check the network (and HF_ENDPOINT or "
        "HF_HUB_OFFLINE, if set) and run this again; --from FILE and --sample need no network"
    )


# ---------------------------------------------------------------- the offline sample


def write_sample(data_root: str | Path, path: str | Path, vocab_size: int = SAMPLE_VOCAB_SIZE) -> None:
    """Write SAMPLE_ROWS rows in HellaSwag's format into `path`, from the validation shard of the folder `data_root`.

    The context of a row is 150 to 299 characters of a document. The true ending is the next 50 to 79 characters. The
    three other endings are the true endings of other rows. The same shard gives the same rows.

    Raises:
        FileNotFoundError: the folder is not prepared.
        ValueError: the folder is damaged, has another vocabulary, or has too little text.
    """
    tokenizer = Tokenizer(vocab_size=vocab_size)
    stream = TokenStream(data_root, "val", vocab_size=vocab_size, fingerprint=tokenizer.fingerprint)
    ids = stream.read(0, len(stream))
    begins, ends = np.flatnonzero(ids == tokenizer.bos_id), np.flatnonzero(ids == tokenizer.eos_id)
    documents = [tokenizer.decode(ids[b + 1 : e].tolist()) for b, e in zip(begins, ends, strict=False)]

    pairs = []  # of a context and its true ending, cut at a space between two words
    for document in documents:
        for cut in re.finditer(r"(?<=\S) (?=\S)", document):
            context = document[max(0, cut.start() - 300) : cut.start()].partition("\n")[2]
            ending = document[cut.end() : cut.end() + 80].rpartition(" ")[0].rstrip()
            if len(context) >= 150 and len(ending) >= 50:
                pairs.append((context, ending))
    if len(pairs) < SAMPLE_ROWS:
        raise ValueError(
            f"{data_root}: its validation shard has text for {len(pairs)} rows, and {SAMPLE_ROWS} are due; "
            "prepare it with a larger --val_fraction"
        )
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


def command_line() -> FlagParser:
    parser = FlagParser(description=__doc__)
    parser.add_argument("--out_dir", help="folder for the file (default: data/hellaswag; the sample: data/sample)")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--from", dest="source", metavar="FILE", help=f"a local copy of {FILE_NAME} or the hub's file")
    source.add_argument("--sample", **SWITCH, help="write the offline sample instead; needs no network")
    return parser


def main() -> int:
    allow_any_text_in_output()
    args = command_line().parse_args()
    try:
        if args.sample:
            prepare(["sample"], SAMPLE_ROOT, vocab_size=SAMPLE_VOCAB_SIZE)
            path = Path(args.out_dir or SAMPLE_ROOT) / SAMPLE_FILE_NAME
            write_sample(SAMPLE_ROOT, path)
            print(f"{path}: {SAMPLE_ROWS} rows in HellaSwag's format from the sample corpus; not HellaSwag")
        else:
            path = download(args.out_dir or "data/hellaswag", args.source)
            print(f"{path}: {NUM_ROWS:,} rows, verified")
    except (SourceError, ValueError, OSError) as error:
        print(f"load_hellaswag_dataset.py: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("load_hellaswag_dataset.py: stopped; run the same command to go on", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
