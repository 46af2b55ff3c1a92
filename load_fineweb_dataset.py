"""Documents -> token shards: FineWeb-Edu's 10-billion-token sample, the sample corpus, any data set, or your own files.

    python load_fineweb_dataset.py                                   FineWeb-Edu sample-10BT, from the Hugging Face hub
    python load_fineweb_dataset.py --stream                          the same, without a copy of its 28.5 GB on the disk
    python load_fineweb_dataset.py --max_tokens 300_000_000          its first 300 million tokens
    python load_fineweb_dataset.py --source sample                   Python's standard library; needs no network
    python load_fineweb_dataset.py --source OWNER/NAME:CONFIG:SPLIT --text_column content     any data set of the hub
    python load_fineweb_dataset.py --source texts/ "more/*.jsonl.gz" c.parquet --out_dir data/mine      your own files
    python load_fineweb_dataset.py --verify                          check every byte and id of a prepared folder
    python load_fineweb_dataset.py --stats                           what a prepared folder holds

Every document becomes <|begin_of_text|> text <|end_of_text|>. A hash of its text decides whether a document is held out
for validation. Held-out documents form shard 0. All others, in order, form one stream of ids, which is cut into shards
of equal size. The bytes of the shards depend only on the source, the vocabulary, the shard size, --max_tokens and
--val_fraction. The number of processes and kills do not change them. After a kill, the same command goes on after the
last whole shard. `manifest.json` describes the folder. It is written last, so a folder with a manifest is complete.
"""

import sys
import time
from pathlib import Path

from threads import num_cores

import numpy as np

from command_line import SWITCH, FlagParser, at_least
from files import allow_any_text_in_output
from preparation import prepare, read_mark
from rows import ReadOptions, SourceError
from shards import id_blocks, is_prepared, open_shard, read_manifest, tokenizer_of, verify
from sources import open_source

DATA_ROOT = Path("data")
SAMPLE_ROOT = "data/sample"
SAMPLE_VOCAB_SIZE = 4096
# Folders in data/ that other scripts expect, and their sources
OWN_FOLDERS = {"sample": ["sample"], "fineweb-edu-10BT": ["fineweb-edu"], "hellaswag": []}

FEW_TOKENS = 8192  # of a validation shard: its loss would be mostly noise
QUANTILES = (0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99)
WINDOW = 100  # tokens in each window of text that --stats shows
LINE_TOKENS, LINE_LENGTH = 40, 80  # of the line of text in the summary


def default_out_dir(source: list[str]) -> Path:
    """data/NAME; or data/NAME-ID if that folder is another script's, or holds anything else than this source."""
    opened = open_source(source)
    folder = DATA_ROOT / opened.label
    if opened.label in OWN_FOLDERS:
        taken = OWN_FOLDERS[opened.label] != source
    else:
        is_used = folder.exists() and any(entry.name != ".lock" for entry in folder.iterdir())
        taken = is_used and not is_mark_of(folder, opened.id)
    return folder.with_name(f"{opened.label}-{opened.id}") if taken else folder


def is_mark_of(folder: Path, source_id: str) -> bool:
    """Whether a folder is the preparation of a source."""
    try:
        return read_mark(folder).get("source_id") == source_id
    except SourceError:  # another program's
        return False


def summary(folder: Path, manifest: dict) -> str:
    """A few lines about a prepared folder: documents and tokens of both parts, and a line of text from each."""
    tokenizer, shards = tokenizer_of(folder, manifest), manifest["shards"]
    odd_documents = manifest.get("odd_documents", {})
    left_out = [f"{count:,} {kind}" for kind, count in odd_documents.items() if kind != "too long for one piece"]
    text_bytes = sum(shard["text_bytes"] for shard in shards)
    lines = [
        f"{folder}: {manifest['documents']:,} documents, {manifest['tokens']:,} tokens in {len(shards)} shards, "
        f"{text_bytes / max(1, manifest['tokens']):.2f} bytes a token"
    ]
    for split, title in (("train", "training"), ("val", "validation")):
        part = [shard for shard in shards if shard["split"] == split]
        documents, tokens = (sum(shard[key] for shard in part) for key in ("documents", "tokens"))
        ids = open_shard(folder / part[0]["file"])[:LINE_TOKENS].tolist() if tokens else []
        text = " ".join(tokenizer.decode([i for i in ids if i < tokenizer.bos_id]).split())
        lines.append(f"  {title:<11}{documents:>12,} documents{tokens:>16,} tokens   {text[:LINE_LENGTH]}")
    if left_out:
        lines.append(f"  odd documents: {', '.join(left_out)}")
    return "\n".join(lines)


def advice(manifest: dict) -> str | None:
    """A sentence about a validation part that is too small or too large. None if it is neither."""
    tokens = {split: sum(s["tokens"] for s in manifest["shards"] if s["split"] == split) for split in ("train", "val")}
    flag = "larger --val_source" if manifest.get("val_source") else "larger --val_fraction, a --val_source"
    if tokens["val"] > tokens["train"]:
        return (
            f"{tokens['val']:,} tokens are held out and {tokens['train']:,} are left to train on: pass a "
            f"{flag.replace('larger', 'smaller').removesuffix(', a --val_source')}"
            " (or a --document_separator, if the source is one long text)"
        )
    if tokens["val"] < FEW_TOKENS:
        return (
            f"{tokens['val']:,} tokens are held out, too few to validate with: pass a {flag}, or a"
            " --document_separator, if the source is one long text"
        )
    return None


def stats(folder: str | Path) -> str:
    """A text about a prepared folder: its documents and their lengths, bytes per token, three random windows of text.

    Lengths are in tokens, with the two control ids.

    Raises:
        FileNotFoundError, ValueError: the folder is not prepared, or a file is damaged.
    """
    folder, manifest = Path(folder), read_manifest(folder)
    tokenizer = tokenizer_of(folder, manifest)
    begins, position = [], 0
    for shard in manifest["shards"]:
        try:
            for ids in id_blocks(folder / shard["file"], tokenizer.vocab_size):
                begins.append(np.flatnonzero(ids == tokenizer.bos_id) + position)
                position += len(ids)
        except ValueError as error:
            raise ValueError(f"{folder / shard['file']}: {error}; delete the folder and prepare it anew") from error
    if not sum(map(len, begins)):
        raise ValueError(f"{folder}: holds no document; prepare it anew")
    lengths = np.diff(np.concatenate([*begins, [position]]))
    text_bytes = sum(shard["text_bytes"] for shard in manifest["shards"])
    quantiles = zip(QUANTILES, np.quantile(lengths, QUANTILES), strict=True)
    lines = [
        f"{manifest.get('source')}, revision {manifest.get('revision')}",
        f"documents            {len(lengths):,}",
        *[f"  {kind:<18} {count:,}" for kind, count in manifest.get("odd_documents", {}).items()],
        f"tokens               {position:,} in {len(manifest['shards'])} shards, {tokenizer.vocab_size:,} ids",
        f"bytes a token        {text_bytes / position:.3f}",
        f"tokens a document    mean {lengths.mean():,.0f}, largest {lengths.max():,}",
        *[f"  {q:>4.0%} have at most  {n:,.0f}" for q, n in quantiles],
    ]
    rng = np.random.default_rng()
    for _ in range(3):
        shard = manifest["shards"][rng.integers(len(manifest["shards"]))]
        ids = open_shard(folder / shard["file"])
        start = int(rng.integers(max(1, len(ids) - WINDOW)))
        text = tokenizer.decode(ids[start : start + WINDOW].tolist())
        lines += ["", f"----- {shard['file']}, tokens {start:,} to {start + WINDOW:,}", text]
    return "\n".join(lines)


def command_line() -> FlagParser:
    parser = FlagParser(description=__doc__)
    add = parser.add_argument
    add(
        "--source",
        nargs="+",
        default=["fineweb-edu"],
        help="sample; or any of fineweb-edu (the default), OWNER/NAME[:CONFIG[:SPLIT]] of the hub, hf://datasets/..., "
        "the address of a data set's page, folders, quoted globs, files",
    )
    add("--text_column", default="text", help="column or key that holds the text (default: text)")
    add("--encoding", help="of .txt, .csv and JSON files (default: what a byte order mark says, or UTF-8)")
    add("--document_separator", metavar="TEXT", help=r"what stands between documents in .txt files; \n is a line end")
    add(
        "--skip_bad_rows",
        type=at_least(0),
        default=0,
        metavar="N",
        help="skip and report up to N broken rows (default: 0)",
    )
    add(
        "--val_fraction",
        type=float,
        metavar="P",
        help="share of documents held out (default: 0.01; the sample: 0.04)",
    )
    add("--val_source", nargs="+", help="separate documents for validation, named as in --source")
    add("--out_dir", help="folder for the shards (default: data/ and the source's name)")
    add("--vocab_size", type=int, help="number of ids, 512 to 128256 (default: 128256; the sample: 4096)")
    add("--shard_size", type=at_least(1), help="tokens in a shard (default: 100 million; the sample: 131072)")
    add("--max_tokens", type=at_least(1), help="stop after the document that reaches this many tokens (default: all)")
    add("--num_proc", type=at_least(1), default=num_cores(), help="worker processes (default: one a core)")
    add("--stream", **SWITCH, help="read the hub's files over the network, without a copy on the disk")
    add("--verify", **SWITCH, help="only check every hash and id of --out_dir; exit status 1 if one is wrong")
    add("--stats", **SWITCH, help="only show the lengths and some text of --out_dir's documents")
    return parser


def main() -> int:
    allow_any_text_in_output()
    args, began = command_line().parse_args(), time.perf_counter()
    separator = args.document_separator
    if args.vocab_size is None:
        args.vocab_size = SAMPLE_VOCAB_SIZE if args.source == ["sample"] else 128_256
    try:
        options = ReadOptions(
            args.text_column,
            args.encoding,
            separator and separator.replace("\\n", "\n").replace("\\t", "\t"),
            args.skip_bad_rows,
        )
        out_dir = Path(args.out_dir) if args.out_dir else default_out_dir(args.source)
        if args.verify or args.stats:
            if args.verify:
                print(verify(out_dir))
            if args.stats:
                print(stats(out_dir))
            return 0
        was_prepared = is_prepared(out_dir)
        flags = ("vocab_size", "shard_size", "max_tokens", "num_proc", "stream", "val_fraction", "val_source")
        manifest = prepare(args.source, out_dir, options=options, **{flag: getattr(args, flag) for flag in flags})
        print(summary(out_dir, manifest))
    except (SourceError, ValueError, OSError) as error:
        print(f"load_fineweb_dataset.py: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("load_fineweb_dataset.py: stopped; the same command goes on after the last whole shard", file=sys.stderr)
        return 130
    print("already prepared" if was_prepared else f"prepared in {time.perf_counter() - began:.1f} s")
    if warning := advice(manifest):
        print(f"load_fineweb_dataset.py: {warning}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
