"""check_house.py: this repository passes it, and each of its rules finds what breaks it."""

import pytest
from check_house import ROOT, findings

MAIN = '\nif __name__ == "__main__":\n    print("run")\n'


def test_the_house_is_in_order():
    assert list(findings(ROOT)) == []


@pytest.mark.parametrize(
    ("files", "finding"),
    [
        ({"a": "x = 1\n" * 400}, "a.py has 403 lines"),
        ({"a": "def long():\n" + "    x = 1\n" * 60}, "a.py: long() has 61 lines; at most 60"),
        ({"train": "def train():\n" + "    x = 1\n" * 100}, "train.py: train() has 101 lines; at most 100"),
        ({"a": "class A:\n    def long(self):\n" + "        x = 1\n" * 60}, "a.py: long() has 61 lines"),
        ({"a": "import b", "b": "from c import d", "c": "def f():\n    import a"}, "in a circle: a -> b -> c -> a"),
        ({"a": "def f():\n    import train", "train": ""}, "a.py imports train.py"),
        ({"files": "import a", "a": "from torch import nn"}, "files.py imports torch"),
        (
            {"a": "import json\nfrom elsewhere.inner import x"},
            "a.py imports elsewhere, which requirements.txt does not",
        ),
        ({"model": "from loss import f", "loss": "import config", "config": ""}, "model.py imports config"),
    ],
)
def test_each_rule_finds_what_breaks_it(tmp_path, files, finding):
    for name, text in files.items():
        (tmp_path / f"{name}.py").write_text(text + MAIN)
    assert any(finding in line for line in findings(tmp_path))


def test_a_file_that_says_nothing_when_it_is_run_is_found(tmp_path):
    (tmp_path / "a.py").write_text("x = 1\n")
    assert list(findings(tmp_path)) == ['a.py says nothing when it is run; end it with `if __name__ == "__main__":`']


def test_a_page_with_the_marks_of_a_merge_is_found(tmp_path):
    (tmp_path / "docs").mkdir()
    for name in ("README.md", "docs/LOG.md"):
        (tmp_path / name).write_text("a\n" + "<" * 7 + " HEAD\nb\n" + "=" * 7 + "\n" + ">" * 7 + " 0f39dd3\n")
    (tmp_path / "docs/plain.md").write_text("a title\n" + "=" * 7 + "\n")
    assert [line.split()[0] for line in findings(tmp_path)] == ["README.md", "docs/LOG.md"]
