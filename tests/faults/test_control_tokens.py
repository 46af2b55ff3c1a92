"""The names of all 256 control tokens as text: in documents, prompts and HellaSwag rows they stay text.

The only control ids in a shard are the begin and the end that the writer puts around each document.
"""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

import generate
from hellaswag_utils import load_examples
from model import ModelConfig
from preparation import prepare
from rows import ReadOptions
from tokenizer import MAX_ENCODE_CHARS, MAX_RUN_CHARS, NUM_SPECIAL_TOKENS, SPECIAL_TOKENS, Tokenizer

pytestmark = pytest.mark.faults

SIZES = (512, 8192, 128_256)


@pytest.fixture(scope="module", params=SIZES)
def tokenizer(request):
    return Tokenizer(vocab_size=request.param)


def documents() -> list[str]:
    """Texts with the names alone, in words, in a row, twice, within each other, and where long texts are cut."""
    texts = [*SPECIAL_TOKENS]
    texts += [f"before{name}after" for name in SPECIAL_TOKENS]
    texts += [f"\n{name}\r\n{name} {name}" for name in SPECIAL_TOKENS]
    texts += [name[:5] + name + name[5:] for name in SPECIAL_TOKENS]
    texts += [f"\ud83d{name}" for name in SPECIAL_TOKENS[:12]]  # half a character, which takes another way
    texts.append("".join(SPECIAL_TOKENS))
    texts.append("<|begin_of_text|>" * 3000)  # cut every MAX_RUN_CHARS characters
    assert len(texts[-1]) > 2 * MAX_RUN_CHARS
    # A name across the place where a long text or a long run is cut, at each of its characters
    words = "word " * (MAX_ENCODE_CHARS // 5)
    texts += [words[shift:] + "<|begin_of_text|>" for shift in (1, 9, 17)]
    texts += ["x" * (MAX_RUN_CHARS - shift) + "<|begin_of_text|>" for shift in range(1, 18)]
    return texts


def as_stored(text: str) -> str:
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def check_shards(folder: Path, tokenizer: Tokenizer, texts: list[str]) -> None:
    """The shards hold these documents, in this order, each between one begin and one end, and no other control id."""
    manifest = json.loads((folder / "manifest.json").read_text())
    ids = np.concatenate([np.load(folder / s["file"]) for s in manifest["shards"] if s["split"] == "train"])
    control = ids[ids >= tokenizer.bos_id]
    assert control.tolist() == [tokenizer.bos_id, tokenizer.eos_id] * len(texts)
    assert manifest["documents"] == len(texts) + 1 and manifest["tokens"] == len(ids) + 3  # one is held out
    begins, ends = np.flatnonzero(ids == tokenizer.bos_id), np.flatnonzero(ids == tokenizer.eos_id)
    assert begins[0] == 0 and (begins[1:] == ends[:-1] + 1).all() and ends[-1] == len(ids) - 1
    for text, begin, end in zip(texts, begins, ends, strict=True):
        assert tokenizer.decode(ids[begin + 1 : end].tolist()) == as_stored(text)


def write_source(folder: Path, texts: list[str]) -> dict:
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (folder / "val.txt").write_text("a")
    return {"source": [str(folder / "a.jsonl")], "val_source": [str(folder / "val.txt")], "show_progress": False}


def test_no_control_id_comes_out_of_documents(tmp_path, tokenizer, no_syncs):
    texts = documents()
    assert len(texts) > 4 * NUM_SPECIAL_TOKENS
    prepare(
        out_dir=tmp_path / "out", vocab_size=tokenizer.vocab_size, shard_size=100_000, **write_source(tmp_path, texts)
    )
    check_shards(tmp_path / "out", tokenizer, texts)


def test_no_control_id_comes_out_of_documents_in_worker_processes(tmp_path, no_syncs, small_batches):
    texts = documents()[: 2 * NUM_SPECIAL_TOKENS]
    prepare(out_dir=tmp_path / "out", vocab_size=512, num_proc=2, **write_source(tmp_path, texts))
    check_shards(tmp_path / "out", Tokenizer(vocab_size=512), texts)


@pytest.mark.parametrize("suffix", [".txt", ".csv", ".json"])
def test_no_control_id_comes_out_of_other_formats(tmp_path, suffix, no_syncs):
    names = [*SPECIAL_TOKENS]
    source = write_source(tmp_path, names)
    path = tmp_path / f"b{suffix}"
    if suffix == ".txt":
        path.write_text("\n---\n".join(names))
    elif suffix == ".csv":
        path.write_text("\n".join(["text", *(f'"{name}"' for name in names)]) + "\n")
    else:
        path.write_text(json.dumps([{"text": name} for name in names]))
    options = ReadOptions(document_separator="\n---\n" if suffix == ".txt" else None)
    source["source"] = [str(path)]
    prepare(out_dir=tmp_path / "out", vocab_size=512, options=options, **source)
    check_shards(tmp_path / "out", Tokenizer(vocab_size=512), names)


def test_a_document_separator_that_is_a_control_name_divides_and_leaves_no_id(tmp_path, no_syncs):
    source = write_source(tmp_path, ["-"])
    (tmp_path / "b.txt").write_text("one<|end_of_text|>two<|begin_of_text|><|end_of_text|>three")
    source["source"] = [str(tmp_path / "b.txt")]
    options = ReadOptions(document_separator="<|end_of_text|>")
    prepare(out_dir=tmp_path / "out", vocab_size=512, options=options, **source)
    check_shards(tmp_path / "out", Tokenizer(vocab_size=512), ["one", "two<|begin_of_text|>", "three"])


# ---------------------------------------------------------------- prompts


class Stub:
    """Stands in for a model: generate.py asks it only for these."""

    def __init__(self, vocab_size: int):
        self.config = ModelConfig(vocab_size=vocab_size, max_seq_len=100_000)


def is_text(ids: list[int], tokenizer: Tokenizer) -> bool:
    """Whether there is a begin id, and after it no control id."""
    return ids[0] == tokenizer.bos_id and all(i < tokenizer.bos_id for i in ids[1:])


@pytest.mark.parametrize("way", ["--prompt", "--prompt_file", "standard input"])
def test_no_control_id_comes_out_of_a_prompt(tmp_path, tokenizer, monkeypatch, capsys, way):
    text = "".join(f"{name} a{name}" for name in SPECIAL_TOKENS)
    (tmp_path / "prompt.txt").write_text(text)
    seen = []
    monkeypatch.setattr(generate, "load_model", lambda path, device: (Stub(tokenizer.vocab_size), {}))
    monkeypatch.setattr(generate, "stream_ids", lambda model, ids, **_: seen.append(ids) or iter(()))
    flags = {"--prompt": ["--prompt", text], "--prompt_file": ["--prompt_file", str(tmp_path / "prompt.txt")]}
    monkeypatch.setattr(sys, "argv", ["generate.py", "--checkpoint", "a", "--device", "cpu", *flags.get(way, [])])
    with open(tmp_path / "prompt.txt") as file:
        monkeypatch.setattr(sys, "stdin", file)
        assert generate.main() == 0
    (ids,) = seen
    assert is_text(ids, tokenizer) and tokenizer.decode(ids[1:]) == text
    assert capsys.readouterr().out == text + "\n"


def test_no_control_id_comes_out_of_a_line_of_the_interactive_loop(tokenizer, monkeypatch, capsys):
    seen = []
    monkeypatch.setattr(generate, "stream_ids", lambda model, ids, **_: seen.append(ids) or iter(()))
    args = generate.command_line().parse_args(["--checkpoint", "a"])
    for name in SPECIAL_TOKENS:
        assert generate.answer(Stub(tokenizer.vocab_size), tokenizer, name, args, None)
    assert len(seen) == NUM_SPECIAL_TOKENS and all(is_text(ids, tokenizer) for ids in seen)


def test_no_control_id_comes_out_of_the_prompts_of_a_run(tokenizer, monkeypatch):
    """train.py's samples take this way, all prompts at once."""
    seen = []
    monkeypatch.setattr(generate, "generate", lambda model, prompts, **_: seen.extend(prompts) or [[] for _ in prompts])
    monkeypatch.setattr(generate, "seeded", lambda seed, device: None)
    stub = Stub(tokenizer.vocab_size)
    stub.output = type("", (), {"weight": type("", (), {"device": "cpu"})})
    settings = {"max_new_tokens": 1, "temperature": 0.0, "top_p": 1.0, "seed": 0}
    assert generate.complete(stub, tokenizer, SPECIAL_TOKENS, **settings) == [*SPECIAL_TOKENS]
    assert len(seen) == NUM_SPECIAL_TOKENS and all(is_text(ids, tokenizer) for ids in seen)


def test_a_stop_text_that_is_a_control_name_is_text():
    tokenizer = Tokenizer(vocab_size=512)
    stream = generate.TextStream(tokenizer, ["<|end_of_text|>"])
    text = "".join(stream.add(token) for token in tokenizer.encode("one<|end_of_text|>two"))
    assert (text, stream.stopped) == ("one", True)


# ---------------------------------------------------------------- HellaSwag


@pytest.mark.parametrize("style", ["gpt2", "lm-eval"])
def test_no_control_id_comes_out_of_rows_of_hellaswag(tmp_path, tokenizer, style):
    with open(tmp_path / "rows.jsonl", "w") as file:
        for name in SPECIAL_TOKENS:
            fields = {"activity_label": name, "ctx_a": f"a {name}", "ctx_b": name, "ctx": f"{name} a {name}{name}"}
            file.write(json.dumps(fields | {"endings": [name, f"b{name}", f"{name}c", f" {name} "], "label": 0}) + "\n")
    examples = load_examples(tmp_path / "rows.jsonl", tokenizer, style=style)
    assert len(examples) == NUM_SPECIAL_TOKENS
    for name, example in zip(SPECIAL_TOKENS, examples, strict=True):
        assert is_text(example.context, tokenizer)
        assert len(example.endings) == 4
        for ending in example.endings:
            assert ending and all(i < tokenizer.bos_id for i in ending)
            assert name in tokenizer.decode(ending)
        assert name in tokenizer.decode(example.context[1:])


def test_the_check_would_see_a_control_id(tmp_path, tokenizer):
    ids = [tokenizer.bos_id, *tokenizer.encode("a"), tokenizer.eos_id]
    assert not is_text(ids, tokenizer)
    assert is_text(ids[:-1], tokenizer)
