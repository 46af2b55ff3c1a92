"""lm-evaluation-harness opens a checkpoint as it lies there, and scores every row as `--style lm-eval` does.

`pip install "lm_eval[hf]"` first: it is too large for every run of the tests.
"""

import json
import random
import subprocess
import sys

import pytest
import torch

import hellaswag_utils
from checkpoints import save_checkpoint
from config import config_as_dict
from hellaswag_utils import load_examples
from model import ModelConfig, Transformer
from model_utils import load_model
from tokenizer import Tokenizer

pytestmark = pytest.mark.slow

TASK = """
task: hellaswag_local
dataset_path: json
dataset_kwargs:
  data_files:
    validation: {path}
output_type: multiple_choice
validation_split: validation
process_docs: !function utils.process_docs
doc_to_text: "{{{{query}}}}"
doc_to_target: "{{{{label}}}}"
doc_to_choice: "choices"
metric_list:
  - metric: acc
  - metric: acc_norm
"""
WORDS = "a man is then seen walking the dog slowly [header] How to [title] Take care [step] water it naïve café".split()  # noqa: SIM905


def write_rows(path, count):
    draw = random.Random(0)

    def text(least, most):
        return " ".join(draw.choices(WORDS, k=draw.randint(least, most)))

    with open(path, "w", encoding="utf-8") as file:
        for i in range(count):
            row = {
                "ind": i,
                "activity_label": text(1, 3),
                "ctx_a": text(5, 20),
                "ctx_b": text(0, 4),
                "ctx": text(5, 20),
            }
            row |= {"endings": [text(2, 12) for _ in range(4)], "label": str(draw.randrange(4)), "split": "val"}
            file.write(json.dumps(row | {"split_type": "indomain", "source_id": f"a~{i}"}) + "\n")
    return path


def test_the_harness_agrees_row_by_row(tmp_path, monkeypatch):
    pytest.importorskip("lm_eval")
    config = ModelConfig(dim=64, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=4096, multiple_of=32, max_seq_len=512)
    torch.manual_seed(0)
    model = Transformer(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    run = {"model": config_as_dict(config), "dtype": "float32"}
    checkpoint = {"step": 1, "model": model.state_dict(), "config": run}
    path = save_checkpoint(tmp_path / "checkpoints", checkpoint, keep=1, is_best=False)
    data = write_rows(tmp_path / "rows.jsonl", 100)
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    (tasks / "local.yaml").write_text(TASK.format(path=data))
    (tasks / "utils.py").write_text("from lm_eval.tasks.hellaswag.utils import process_docs\n")
    command = [sys.executable, "-m", "lm_eval", "--model", "hf", "--model_args", f"pretrained={path},dtype=float32"]
    command += ["--tasks", "hellaswag_local", "--include_path", str(tasks), "--output_path", str(tmp_path / "out")]
    command += ["--log_samples", "--device", "cpu", "--batch_size", "8"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    [samples] = (tmp_path / "out").rglob("samples_hellaswag_local_*.jsonl")
    theirs = {row["doc_id"]: (row["acc"], row["acc_norm"]) for row in map(json.loads, samples.read_text().splitlines())}

    loaded, _ = load_model(path, "cpu")
    examples = load_examples(data, Tokenizer(vocab_size=4096), style="lm-eval")
    ours = {}
    for i, example in enumerate(examples):
        counts = hellaswag_utils.as_metrics(hellaswag_utils.count_correct(loaded, [example]))
        ours[i] = (counts["hellaswag_acc"], counts["hellaswag_acc_norm"])
    assert ours == theirs and len(ours) == 100
    assert 0 < sum(acc for acc, _ in ours.values()) < 100
