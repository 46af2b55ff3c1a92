import io
import itertools
import json
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from test_model import hf_twin
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import TikTokenConverter

import hardware
import hellaswag_utils
import loss
from checkpoints import save_checkpoint
from cpu_kernels import FewRowsLinear
from hellaswag_utils import (
    Example,
    as_metrics,
    benchmark_name,
    choose,
    count_correct,
    iterate_rows,
    load_examples,
    pack,
    render,
    score,
)
from model import ModelConfig, Transformer
from tokenizer import NUM_SPECIAL_TOKENS, SPECIAL_TOKENS, SPLIT_PATTERN, Tokenizer

VOCAB = 512
CONFIG = ModelConfig(
    dim=32, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=VOCAB, multiple_of=32, rope_theta=100.0, max_seq_len=40
)
ROW = {"ind": 1, "ctx": "A cat", "endings": ["sat.", "flew away.", "", "<|end_of_text|>"], "label": 2}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """A second thread only waits at this size. It waits for seconds if other programs keep the cores busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer(vocab_size=VOCAB)


def random_model(config):
    """A random model with large weights. For a fresh model all endings are nearly equally likely."""
    torch.manual_seed(0)
    model = Transformer(config).eval()
    for parameter in model.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.fixture(scope="module")
def model():
    return random_model(CONFIG)


def random_examples(count, *, context=(1, 20), ending=(1, 19), seed=1):
    """Examples with 2 to 5 endings. They fit the model's 40 positions, unless the caller asks for longer ones."""
    generator = torch.Generator().manual_seed(seed)

    def ids(low, high):
        length = int(torch.randint(low, high + 1, (), generator=generator))
        return torch.randint(VOCAB, (length,), generator=generator).tolist()

    examples = []
    for i in range(count):
        endings = [ids(*ending) for _ in range(2 + i % 4)]
        examples.append(Example(ids(*context), endings, i % len(endings)))
    return examples


def naive_log_probs(model, context, ending):
    """Compute one text at a time, with all logits at all positions, and loop over the ending."""
    ids = context + ending
    with torch.no_grad():
        log_probs = model(torch.tensor([ids[:-1]]))[0].double().log_softmax(-1)
    return [log_probs[i - 1, ids[i]].item() for i in range(len(context), len(ids))]


def naive_counts(model, examples):
    right, right_norm = 0, 0
    for example in examples:
        scores = [naive_log_probs(model, example.context, ending) for ending in example.endings]
        sums = [sum(score) for score in scores]
        means = [sum(score) / len(score) for score in scores]
        right += sums.index(max(sums)) == example.label
        right_norm += means.index(max(means)) == example.label
    return [right, right_norm, len(examples)]


@pytest.fixture(scope="module")
def examples():
    return random_examples(40)


@pytest.fixture(scope="module")
def expected(model, examples):
    counts = naive_counts(model, examples)
    assert 0 < counts[0] < 40 and 0 < counts[1] < 40 and counts[0] != counts[1], "these would show nothing"
    return counts


# ---------------------------------------------------------------- rows and their ids


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_rows_come_in_order_and_whole(tmp_path):
    rows = [ROW, {**ROW, "label": "3"}, {**ROW, "ctx": "Zürich 東京"}]  # the hub's copy has labels as strings
    assert list(iterate_rows(write_rows(tmp_path / "a.jsonl", rows))) == rows


def without(field):
    return json.dumps({name: value for name, value in ROW.items() if name != field})


@pytest.mark.parametrize(
    "line",
    [
        "{",
        "[" * 100_000,  # deeper than the parser goes
        "null",
        "[1, 2]",
        '"ctx endings label"',
        "<html>",
        without("ctx"),
        without("endings"),
        without("label"),
        json.dumps({**ROW, "ctx": None}),
        json.dumps({**ROW, "endings": 4}),
        json.dumps({**ROW, "endings": []}),
        json.dumps({**ROW, "endings": "four letters"}),
        json.dumps({**ROW, "endings": ["a", None, "c", "d"]}),
        json.dumps({**ROW, "label": 4}),
        json.dumps({**ROW, "label": -1}),
        json.dumps({**ROW, "label": ""}),  # HellaSwag's own test split
        json.dumps({**ROW, "label": None}),
        json.dumps(ROW)[:-9],
        b"\xff\xfe",
    ],
)
def test_a_malformed_row_is_named_by_file_and_line(tmp_path, line):
    path = tmp_path / "a.jsonl"
    good = json.dumps(ROW).encode() + b"\n"
    path.write_bytes(good + good + (line if isinstance(line, bytes) else line.encode()) + b"\n" + good)
    rows = iterate_rows(path)
    with pytest.raises(ValueError) as error:
        assert [next(rows), next(rows)] == [ROW, ROW]
        next(rows)
    assert str(error.value).startswith(f"{path}, line 3: ")


@pytest.mark.parametrize("end", [b"\n", b"\r\n"], ids=["LF", "CRLF"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"], ids=["plain", "byte order mark"])
def test_blank_lines_and_a_byte_order_mark_are_skipped(tmp_path, end, mark):
    """Editors and Windows programs leave these. Blank lines count where a broken line is named by its number."""
    path, line = tmp_path / "a.jsonl", json.dumps(ROW).encode()
    path.write_bytes(mark + end.join([line, b"", line, b" \t", b""]))
    assert list(iterate_rows(path)) == [ROW, ROW]
    path.write_bytes(mark + end.join([b"", b"", line, b"", line[:-1], b""]))
    with pytest.raises(ValueError, match="line 5: "):
        list(iterate_rows(path))


def test_a_row_becomes_ids_and_the_space_belongs_to_the_ending(tokenizer):
    example = render(ROW, tokenizer)
    assert example.context == [tokenizer.bos_id, *tokenizer.encode("A cat")]
    assert [tokenizer.decode(ending) for ending in example.endings] == [" " + ending for ending in ROW["endings"]]
    assert example.label == 2
    # The last ending only looks like a control id.
    assert all(i < VOCAB - 256 for ending in example.endings for i in ending)
    assert render({**ROW, "ctx": "<|eot_id|>", "label": "1"}, tokenizer).context.count(tokenizer.bos_id) == 1
    assert render({**ROW, "label": "1"}, tokenizer).label == 1


def test_a_limit_takes_the_first_rows_and_reads_no_further(tmp_path, tokenizer):
    path = write_rows(tmp_path / "a.jsonl", [{**ROW, "ctx": str(i)} for i in range(5)] + ["malformed"])
    examples = load_examples(path, tokenizer, limit=3)
    assert [tokenizer.decode(example.context[1:]) for example in examples] == ["0", "1", "2"]
    with pytest.raises(ValueError, match="line 6"):
        load_examples(path, tokenizer)


@pytest.mark.parametrize("content", [b"", b"\n\n", b"\xef\xbb\xbf"], ids=["empty", "blank", "byte order mark"])
def test_a_file_without_rows_is_refused(tmp_path, tokenizer, content):
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(ValueError) as error:
        load_examples(tmp_path / "a.jsonl", tokenizer)
    assert str(error.value).startswith(f"{tmp_path / 'a.jsonl'}: holds no rows; ")


# ---------------------------------------------------------------- scores


def test_log_probabilities_equal_those_of_one_text_at_a_time(model):
    examples = random_examples(20)
    for example, log_probs in zip(examples, score(model, examples), strict=True):
        for ending, one in zip(example.endings, log_probs, strict=True):
            assert one.tolist() == pytest.approx(naive_log_probs(model, example.context, ending), abs=1e-4)


def test_counts_equal_those_of_one_text_at_a_time(model, examples, expected):
    assert count_correct(model, examples) == expected


@pytest.mark.parametrize("batch_tokens", [1, 40, 100, 333, 10_000])
def test_counts_do_not_depend_on_the_batch_size(model, examples, expected, batch_tokens):
    assert count_correct(model, examples, batch_tokens=batch_tokens) == expected


@pytest.mark.parametrize("world_size", [2, 3, 4, 50])  # 50 processes: some have no example
def test_the_shares_of_all_ranks_add_up_to_the_whole(model, examples, expected, world_size):
    shares = [
        count_correct(model, examples, rank=rank, world_size=world_size, batch_tokens=90) for rank in range(world_size)
    ]
    assert [sum(column) for column in zip(*shares, strict=True)] == expected
    assert max(share[2] for share in shares) - min(share[2] for share in shares) <= 1


def watch(monkeypatch, model, name):
    """The shape of the input of a method of `model`, for each call."""
    shapes, method = [], getattr(model, name)

    def watched(x, **kwargs):
        shapes.append(tuple(x.shape))
        return method(x, **kwargs)

    monkeypatch.setattr(model, name, watched)
    return shapes


def test_a_context_is_computed_once_for_all_its_endings(model, monkeypatch):
    shapes = watch(monkeypatch, model, "hidden")
    example = Example([1, 2, 3, 4, 5], [[6, 7], [8], [9, 10, 11], [12, 13, 14, 15]], 0)
    score(model, [example])
    assert shapes == [(1, 5 + 1 + 0 + 2 + 3)]  # an ending's last token is predicted, not read


def test_batches_are_bounded_in_tokens_and_hold_little_padding(model, monkeypatch):
    examples = random_examples(200, context=(5, 20), ending=(1, 5))
    shapes = watch(monkeypatch, model, "hidden")
    score(model, examples, batch_tokens=400)
    computed = [rows * longest for rows, longest in shapes]
    needed = sum(len(e.context) + sum(len(ending) - 1 for ending in e.endings) for e in examples)
    assert max(computed) <= 400 and len(shapes) < 2 * needed / 400
    assert needed <= sum(computed) < 1.1 * needed
    assert shapes[0][1] == max(longest for _, longest in shapes)  # the longest rows come first
    # A few rows of many lengths make several batches. In a single batch a third would be padding.
    shapes.clear()
    score(model, [Example([1] * n, [[2, 3]], 0) for n in (36, 35, 20, 19, 5)], batch_tokens=10_000)
    assert shapes == [(2, 37), (2, 21), (1, 6)]


def test_the_output_layer_runs_in_slices_and_only_where_endings_are_predicted(model, examples, monkeypatch):
    expected = score(model, examples)
    monkeypatch.setattr(loss, "SLICE", 64)
    monkeypatch.setattr(loss, "BLOCK", 200)  # of 512 ids: the last block is smaller
    shapes, mm = [], torch.mm

    def watched(x: torch.Tensor, weight: torch.Tensor, **kwargs) -> torch.Tensor:
        shapes.append((len(x), weight.shape[1]))
        return mm(x, weight, **kwargs)

    monkeypatch.setattr(torch, "mm", watched)  # the output layer's product
    sliced = score(model, examples, batch_tokens=10_000)
    # The last token of a row's context predicts the first tokens of all endings. It is one position, not one for each.
    rows = pack(examples, CONFIG.max_seq_len)
    positions = sum(1 + sum(len(ending) - 1 for ending in row.endings) for row in rows)
    assert sum(rows * ids for rows, ids in shapes) == positions * VOCAB
    assert max(shapes) == (64, 200)
    for a, b in zip(itertools.chain(*expected), itertools.chain(*sliced), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "example",
    [
        Example([1], [[2], [3], [4], [5]], 0),  # the context is only the begin-of-text id; an ending is one token
        Example([*range(100, 130)], [[i] * 9 for i in range(2, 20)], 0),  # too many endings for a row of 40 tokens
        Example([*range(100, 130)], [[2] * 11], 0),  # one ending, which just fits
        Example(
            [*range(100, 138)], [[2] * 5, [3], [4] * 3, [5] * 4], 0
        ),  # some share the context, others lose its beginning
    ],
)
def test_endings_of_all_kinds_have_the_scores_that_they_have_alone(model, example):
    assert all(len(row) <= CONFIG.max_seq_len for row in pack([example], CONFIG.max_seq_len))
    [log_probs] = score(model, [example])
    for ending, one in zip(example.endings, log_probs, strict=True):
        context = example.context[-(41 - len(ending)) :]
        assert one.tolist() == pytest.approx(naive_log_probs(model, context, ending), abs=1e-4)


def test_a_token_that_nothing_predicts_does_not_count(model):
    [[first, second, third]] = score(model, [Example([], [[1, 2, 3], [4], []], 0)])
    assert first.tolist() == pytest.approx(naive_log_probs(model, [1], [2, 3]), abs=1e-4)
    assert len(second) == len(third) == 0
    assert count_correct(model, [Example([1], [[], [2]], 1)]) == [0, 1, 1]  # an empty ending has no mean


def test_rows_with_empty_texts_have_scores(model, tokenizer):
    for style in ("gpt2", "lm-eval"):
        row = {"ctx": "", "activity_label": "", "ctx_a": "", "ctx_b": "", "endings": ["", "a", "[b]"], "label": 0}
        [log_probs] = score(model, [render(row, tokenizer, style)])
        assert all(len(one) >= 1 and one.isfinite().all() for one in log_probs)


def test_acc_takes_the_sum_and_acc_norm_the_mean(model, monkeypatch):
    # Ending 0: three tokens of -1. Ending 1: one token of -2. The sum prefers 1, the mean prefers 0.
    log_probs = {(7, 7, 7): [-1.0, -1.0, -1.0], (7,): [-2.0]}
    monkeypatch.setattr(
        hellaswag_utils,
        "ending_log_probs",
        lambda model, rows: [torch.tensor(log_probs[tuple(ending)]) for row in rows for ending in row.endings],
    )
    endings = [[7, 7, 7], [7]]
    assert count_correct(model, [Example([1], endings, 0)]) == [0, 1, 1]
    assert count_correct(model, [Example([1], endings, 1)]) == [1, 0, 1]
    # Divided by lengths of 9 and 9, the means are -1/3 and -2/9. With a length of 0 the second ending has no mean.
    assert count_correct(model, [Example([1], endings, 1, lengths=[9, 9])]) == [1, 1, 1]
    assert count_correct(model, [Example([1], endings, 0, lengths=[9, 0])]) == [0, 1, 1]


@pytest.mark.parametrize("context_len", [1, 2, 30, 31, 32, 33, 100])
def test_a_text_that_is_too_long_loses_its_beginning_and_keeps_its_ending(model, context_len):
    # 40 positions hold 40 inputs. The last token is only a target, so 41 ids fit. Here the ending has 10 of them.
    (example,) = random_examples(1, context=(context_len, context_len), ending=(10, 10))
    [log_probs] = score(model, [example])
    for ending, one in zip(example.endings, log_probs, strict=True):
        assert len(one) == 10
        assert one.tolist() == pytest.approx(naive_log_probs(model, example.context[-31:], ending), abs=1e-4)


@pytest.mark.parametrize("ending_len", [39, 40, 41, 90])
def test_an_ending_that_is_too_long_is_scored_by_its_last_tokens(model, ending_len):
    (example,) = random_examples(1, context=(5, 5), ending=(ending_len, ending_len))
    [log_probs] = score(model, [example])
    for ending, one in zip(example.endings, log_probs, strict=True):
        ids = (example.context + ending)[-41:]
        scored = min(ending_len, 40)
        assert len(one) == scored
        assert one.tolist() == pytest.approx(naive_log_probs(model, ids[:-scored], ids[-scored:]), abs=1e-4)


def test_long_and_short_texts_share_a_batch(model):
    examples = random_examples(12, context=(1, 80), ending=(1, 60))
    alone = [count_correct(model, [example]) for example in examples]
    assert count_correct(model, examples, batch_tokens=120) == [sum(column) for column in zip(*alone, strict=True)]


def test_scoring_keeps_no_activations_for_a_backward_pass(model):
    assert not any(one.requires_grad for log_probs in score(model, random_examples(2)) for one in log_probs)


def test_metrics_are_shares_of_the_examples():
    metrics = {"hellaswag_acc": 0.25, "hellaswag_acc_norm": 0.5, "hellaswag_examples": 8}
    assert as_metrics([2.0, 4.0, 8.0]) == metrics
    assert isinstance(as_metrics([2.0, 4.0, 8.0])["hellaswag_examples"], int)


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("data/hellaswag/hellaswag_val.jsonl", "HellaSwag"),
        ("HellaSwag_val.jsonl", "HellaSwag"),
        ("data/sample/sample_continuations.jsonl", "sample continuations"),
        ("data/hellaswag/sample_continuations.jsonl", "sample continuations"),
        ("my_own.jsonl", "my own"),
    ],
)
def test_only_hellaswags_own_file_is_called_hellaswag(path, name):
    assert benchmark_name(path) == name


# ---------------------------------------------------------------- the command line


def save(folder, model, tokenizer, dtype="float32"):
    return save_checkpoint(
        folder,
        {
            "step": 30,
            "model": model.state_dict(),
            "config": {"model": asdict(CONFIG), "dtype": dtype},
            "tokenizer_fingerprint": tokenizer.fingerprint,
        },
        keep=1,
        is_best=False,
    )


@pytest.fixture
def checkpoint(tmp_path, model, tokenizer):
    return save(tmp_path / "run" / "checkpoints", model, tokenizer)


@pytest.fixture
def data(tmp_path):
    texts = ["A cat sat", "Rain fell", "One, two", "The end of", "What"]
    rows = [{**ROW, "ctx": text, "label": i % 4} for i, text in enumerate(texts)]
    return write_rows(tmp_path / "sample_continuations.jsonl", rows)


def main(monkeypatch, *args):
    monkeypatch.setattr(sys, "argv", ["hellaswag_utils.py", "--device", "cpu", *map(str, args)])
    return hellaswag_utils.main()


@pytest.mark.parametrize("where", ["file", "run"])
def test_the_last_line_of_the_output_is_a_json_object(
    tmp_path, monkeypatch, capsys, model, tokenizer, checkpoint, data, where
):
    path = checkpoint if where == "file" else tmp_path / "run"
    assert main(monkeypatch, "--checkpoint", path, "--data", data, "--batch_tokens", 50) == 0
    right, right_norm, examples = naive_counts(model, load_examples(data, tokenizer))
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == {
        "benchmark": "sample continuations",
        "style": "gpt2",
        "step": 30,
        "hellaswag_acc": right / 5,
        "hellaswag_acc_norm": right_norm / 5,
        "hellaswag_examples": examples,
    }


def test_a_limit_scores_the_first_rows(monkeypatch, capsys, model, tokenizer, checkpoint, data):
    assert main(monkeypatch, "--checkpoint", checkpoint, "--data", data, "--limit", 3) == 0
    right, right_norm, _ = naive_counts(model, load_examples(data, tokenizer)[:3])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["hellaswag_examples"] == 3
    assert (result["hellaswag_acc"], result["hellaswag_acc_norm"]) == (right / 3, right_norm / 3)


@pytest.mark.parametrize("trained_in", ["bfloat16", "float16"])
@pytest.mark.parametrize("has_it", [False, True])
def test_a_checkpoint_is_scored_in_the_dtype_that_it_was_trained_in_where_hardware_has_it(
    tmp_path, monkeypatch, capsys, model, tokenizer, data, trained_in, has_it
):
    used, mm = set(), torch.mm
    monkeypatch.setattr(torch, "mm", lambda *args, out: used.add((y := mm(*args, out=out)).dtype) or y)
    monkeypatch.setattr(hardware, "has_in_hardware", lambda device, dtype: has_it)
    monkeypatch.setattr(FewRowsLinear, "forward", lambda self, x: used.add((y := F.linear(x, self.weight)).dtype) or y)
    path = save(tmp_path / "half", model, tokenizer, dtype=trained_in)
    assert main(monkeypatch, "--checkpoint", path, "--data", data) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["hellaswag_examples"] == 5
    assert used == {getattr(torch, trained_in) if has_it else torch.float32}


def missing(path):
    path.unlink()


def empty(path):
    path.write_bytes(b"")


def garbage(path):
    path.write_bytes(b"<html>404</html>")


@pytest.mark.parametrize("damage", [missing, empty, garbage])
@pytest.mark.parametrize("which", ["checkpoint", "data"])
def test_a_missing_or_damaged_file_gives_one_sentence_and_status_1(
    monkeypatch, capsys, checkpoint, data, which, damage
):
    path = checkpoint / "model.safetensors" if which == "checkpoint" else data
    damage(path)
    assert main(monkeypatch, "--checkpoint", checkpoint, "--data", data) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert line.startswith("hellaswag_utils.py: ")
    assert str(path) in line


def test_a_file_is_named_in_a_terminal_that_lacks_its_characters(monkeypatch, tmp_path, checkpoint):
    err = io.TextIOWrapper(io.BytesIO(), "cp1252", errors="strict")
    monkeypatch.setattr(sys, "stderr", err)
    assert main(monkeypatch, "--checkpoint", checkpoint, "--data", tmp_path / "東京.jsonl") == 1
    err.flush()
    assert b"\\u6771\\u4eac.jsonl" in err.buffer.getvalue()


@pytest.mark.parametrize("flag", ["--limit", "--batch_tokens"])
def test_a_number_below_1_is_refused(monkeypatch, capsys, checkpoint, data, flag):
    with pytest.raises(SystemExit):
        main(monkeypatch, "--checkpoint", checkpoint, "--data", data, flag, 0)
    assert "must be at least 1" in capsys.readouterr().err


# ---------------------------------------------------------------- lm-evaluation-harness


LM_EVAL_ROWS = [
    {"activity_label": "Roof shingle removal", "ctx_a": "A man is sitting on a roof.", "ctx_b": "he Wears A hat and"},
    {"activity_label": "Pets", "ctx_a": "[header] How to wash a cat [title] Find it. [step] Look\nhere.", "ctx_b": ""},
    {"activity_label": "Zürich", "ctx_a": "Ein Zug [substeps]", "ctx_b": "fährt  ab und"},
    {"activity_label": " Ends in space", "ctx_a": "The label is stripped, the brackets are not. [step]", "ctx_b": ""},
    {"activity_label": "[a", "ctx_a": "b", "ctx_b": "]"},  # only the begin-of-text id is left
    {"activity_label": "Line end", "ctx_a": "It ended.\n[step]", "ctx_b": ""},  # ".\n" is one token, "." another
    {"activity_label": "long", "ctx_a": "word " * 30 + "and", "ctx_b": "so on"},  # longer than the model's context
]
ENDINGS = [
    [" sat down.", "[title] Tips [substeps] Use soap, not oil.", "é è ê ü ö ä", "flew away."],
    ["runs.", "[step] walks [title] off.", "", "東京"],
    ["ééééé", "runs off.", "üüü", "東京"],  # lengths in characters and in bytes choose differently
]


def lm_eval_rows():
    """Each row with each label. The label that counts as right shows which ending was chosen."""
    for i, (row, endings, label) in enumerate(itertools.product(LM_EVAL_ROWS, ENDINGS, range(4))):
        yield {"ind": i, **row, "ctx": "not read", "endings": endings, "label": label}


def test_rows_are_rendered_as_lm_eval_renders_them(tokenizer):
    row = {**LM_EVAL_ROWS[0], "endings": ENDINGS[0], "label": "1"}
    example = render(row, tokenizer, "lm-eval")
    # str.capitalize also makes the other letters small. A removed bracket leaves a space.
    context = "Roof shingle removal: A man is sitting on a roof. He wears a hat and"
    assert example.context == tokenizer.encode(context, bos=True)
    endings = [" sat down.", "  Tips Use soap, not oil.", " é è ê ü ö ä", " flew away."]
    assert [tokenizer.decode(ending) for ending in example.endings] == endings
    assert example.lengths == [9, 24, 11, 10]  # in characters, without the space that joins
    assert example.label == 1
    example = render({**row, **LM_EVAL_ROWS[1]}, tokenizer, "lm-eval")
    assert tokenizer.decode(example.context[1:]) == "Pets: How to wash a cat. Find it. Look\nhere."
    # White space at the end of the context belongs to the ending.
    example = render({**row, **LM_EVAL_ROWS[3]}, tokenizer, "lm-eval")
    assert tokenizer.decode(example.context[1:]).endswith("are not.")
    assert tokenizer.decode(example.endings[3]) == "  flew away."
    # In the whole text "." and the line end are one token. The context alone lacks that token, so it is dropped.
    words = Tokenizer(vocab_size=8192)
    example = render({**row, **LM_EVAL_ROWS[5]}, words, "lm-eval")
    assert words.decode(example.context[1:]) == "Line end: It ended."
    assert words.decode(example.endings[3]) == " flew away."
    # Text that looks like a control token stays text.
    example = render({**row, "ctx_a": "<|eot_id|>", "endings": ["<|eot_id|>", ""], "label": 0}, tokenizer, "lm-eval")
    assert all(i < VOCAB - 256 for ids in (example.context[1:], *example.endings) for i in ids)
    assert example.lengths == [10, 0]


@pytest.mark.parametrize("field", ["activity_label", "ctx_a", "ctx_b"])
def test_a_row_without_lm_evals_fields_is_named_by_file_and_line(tmp_path, monkeypatch, capsys, checkpoint, field):
    rows = list(lm_eval_rows())[:2]
    path = write_rows(tmp_path / "a.jsonl", [rows[0], {k: v for k, v in rows[1].items() if k != field}])
    assert len(list(iterate_rows(path))) == 2  # the other style does not read the field
    assert main(monkeypatch, "--checkpoint", checkpoint, "--data", path, "--style", "lm-eval") == 1
    expected = f"hellaswag_utils.py: {path}, line 2: not a row of HellaSwag ({field} is missing); mend the line\n"
    assert capsys.readouterr().err == expected


def hugging_face_tokenizer(tokenizer, folder):
    """Our tokenizer as Hugging Face's, with the same ids. Begin-of-text comes first, as in Llama 3's published one."""
    lines = tokenizer.path.read_bytes().splitlines(keepends=True)[: tokenizer.vocab_size - NUM_SPECIAL_TOKENS]
    path = folder / "tokenizer.model"
    path.write_bytes(b"".join(lines))
    converted = TikTokenConverter(
        str(path), pattern=SPLIT_PATTERN, extra_special_tokens=list(SPECIAL_TOKENS)
    ).converted()
    bos = "<|begin_of_text|>"
    converted.post_processor = TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, tokenizer.bos_id)])
    return PreTrainedTokenizerFast(tokenizer_object=converted, bos_token=bos, eos_token="<|end_of_text|>")


def lm_eval_samples(model, tokenizer, data, folder):
    """The results of lm-evaluation-harness for each row of the file `data`, from its hellaswag task."""
    lm_eval = pytest.importorskip("lm_eval", reason="pip install 'lm-eval[hf]>=0.4.13,<0.5'")
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    task = Path(lm_eval.__file__).parent / "tasks" / "hellaswag" / "hellaswag.yaml"
    source = {"data_files": {"validation": str(data)}, "cache_dir": str(folder / "cache")}
    config = {"include": str(task), "task": "hellaswag_here", "dataset_path": "json", "dataset_kwargs": source}
    (folder / "hellaswag_here.yaml").write_text(json.dumps(config | {"training_split": None}))
    results = lm_eval.simple_evaluate(
        model=HFLM(hf_twin(model), tokenizer=hugging_face_tokenizer(tokenizer, folder), batch_size=4),
        tasks=["hellaswag_here"],
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
        bootstrap_iters=0,
    )
    return sorted(results["samples"]["hellaswag_here"], key=lambda sample: sample["doc_id"])


@pytest.mark.slow
def test_log_likelihoods_and_choices_equal_lm_evaluation_harness(tmp_path):
    """This needs the harness. Its 47 packages are not among those that the tests install:

    pip install "lm-eval[hf]>=0.4.13,<0.5" && python -m pytest -m slow tests/test_hellaswag_utils.py
    """
    data = write_rows(tmp_path / "rows.jsonl", lm_eval_rows())
    tokenizer = Tokenizer(vocab_size=8192)  # with merges, some of them across the end of a context
    model = random_model(replace(CONFIG, vocab_size=8192))
    samples = lm_eval_samples(model, tokenizer, data, tmp_path)
    examples = load_examples(data, tokenizer, style="lm-eval")
    scores = score(model, examples)
    for example, log_probs, sample in zip(examples, scores, samples, strict=True):
        theirs = [log_likelihood for [[log_likelihood, _]] in sample["resps"]]
        assert [ending.sum().item() for ending in log_probs] == pytest.approx(theirs, abs=1e-3)
        by_sum, by_norm = choose(example, log_probs)
        assert ((by_sum == example.label), (by_norm == example.label)) == (sample["acc"], sample["acc_norm"])
    in_bytes = [
        replace(e, lengths=[len(end.encode()) for end in s["doc"]["choices"]])
        for e, s in zip(examples, samples, strict=True)
    ]
    others = [
        choose(e, log_probs)[1] != choose(b, log_probs)[1]
        for e, b, log_probs in zip(examples, in_bytes, scores, strict=True)
    ]
    assert any(others), "this would not tell characters from bytes"
