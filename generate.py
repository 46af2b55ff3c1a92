"""Continue a text with the model of a checkpoint, in a terminal. The text comes token by token.

    python generate.py --checkpoint runs/sample --prompt "def main("
    python generate.py --checkpoint runs/sample                                  asks for prompts, one after another
    echo "def main(" | python generate.py --checkpoint runs/sample > text.txt    reads the prompt from standard input

A model that was trained in bfloat16 has bfloat16 weights here if this device is fast in it, else float32 weights.

Only text goes to standard output. The speed and all messages go to standard error.
"""

import argparse
import codecs
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import threads  # noqa: F401 (it sets how threads wait)

import torch
from torch import Tensor

from command_line import SWITCH, FlagParser
from files import allow_any_text_in_output
from hardware import dtype_as_trained, pick_device
from model import Transformer
from model_utils import cast_parameters, load_model
from sampling import Sampling, drop_oldest, generate, seeded, stream_ids
from tokenizer import Tokenizer

# ---------------------------------------------------------------- text


def complete(
    model: Transformer,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    seed: int,
    is_stopped: Callable[[], bool] = lambda: False,
) -> list[str]:
    """Continue each prompt. Returns prompt and continuation as one text. The same seed gives the same texts.

    Raises what `generate` raises.
    """
    encoded = [tokenizer.encode(prompt, bos=True) for prompt in prompts]
    continuations = generate(
        model,
        encoded,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        stop_tokens=tokenizer.stop_tokens,
        generator=seeded(seed, model.output.weight.device),
        is_stopped=is_stopped,
    )
    return [tokenizer.decode(prompt[1:] + ids) for prompt, ids in zip(encoded, continuations, strict=True)]


class TextStream:
    """Turns ids into text as they come. `stopped` says whether a stop text has come; the text ends before it.

    What may change with the next id is held back: half a character, and what may be the beginning of a stop text.
    """

    def __init__(self, tokenizer: Tokenizer, stop_texts: Sequence[str] = ()):
        self._bytes = tokenizer.tokens  # of each id
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._stop_texts = stop_texts
        self._held = ""
        self.stopped = False

    def add(self, token: int) -> str:
        """The text that is certain now, and was not before this id."""
        return self._release(self._decoder.decode(self._bytes[token]))

    def finish(self) -> str:
        """The text that was held back, when no more ids come."""
        released = self._release(self._decoder.decode(b"", final=True))
        return released if self.stopped else released + self._held

    def _release(self, text: str) -> str:
        if self.stopped:
            return ""
        text = self._held + text
        # The stop text that ends first counts, as if the characters came one by one.
        if found := [(i + len(stop), i) for stop in self._stop_texts if (i := text.find(stop)) >= 0]:
            self.stopped, end = True, min(found)[1]
        else:
            end = len(text) - max((overlap(text, stop) for stop in self._stop_texts), default=0)
        self._held = text[end:]
        return text[:end]


def overlap(text: str, stop: str) -> int:
    """How many characters at the end of `text` are the beginning of `stop`, but not all of it."""
    return next(n for n in range(min(len(text), len(stop) - 1), -1, -1) if text.endswith(stop[:n]))


def belief(tokenizer: Tokenizer, token: int, logits: Tensor) -> str:
    """A line: the logarithm of the probability that the model gave an id, the probability, and the likeliest ids.

    No setting of the draw changes these numbers.
    """

    def name(token: int) -> str:
        piece = tokenizer.tokens[token]
        try:
            return repr(piece.decode())
        except UnicodeDecodeError:  # part of a character
            return repr(piece)

    logprobs = torch.log_softmax(logits.float(), dim=-1)
    top = logprobs.topk(min(5, len(logprobs)))
    likeliest = (f"{name(i)} {math.exp(p):.1%}" for p, i in zip(top.values.tolist(), top.indices.tolist(), strict=True))
    mine = float(logprobs[token])
    return f"{mine:8.3f} {math.exp(mine):6.1%}  {name(token):<16} likeliest: {', '.join(likeliest)}"


def coloured(text: str, token: int, logits: Tensor) -> str:
    """`text` in green if the model gave `token` a probability of a half or more, yellow from a tenth, red below."""
    probability = float(torch.softmax(logits.float(), dim=-1)[token])
    colour = 32 if probability >= 0.5 else 33 if probability >= 0.1 else 31
    return f"\x1b[{colour}m{text}\x1b[0m" if text else ""


# ---------------------------------------------------------------- settings


class Setting(NamedTuple):
    """A flag, and a command of the interactive loop."""

    parse: Callable[[str], Any]
    default: Any
    is_right: Callable[[Any], bool]
    must_be: str
    help: str


SETTINGS = {
    "max_new_tokens": Setting(int, 200, lambda n: n >= 1, "a whole number from 1", "tokens of each text"),
    "temperature": Setting(float, 0.8, lambda t: 0 <= t < math.inf, "a number from 0", "0 takes the likeliest id"),
    "top_p": Setting(float, 0.95, lambda p: 0 < p <= 1, "above 0 and at most 1", "probability of the nucleus; 1: off"),
    "top_k": Setting(int, 0, lambda k: k >= 0, "a whole number from 0", "draw from so many likeliest ids; 0: off"),
    "repetition_penalty": Setting(
        float, 1.0, lambda r: 0.01 <= r <= 100, "a number from 0.01 to 100", "above 1 repeats less; 1: off"
    ),
    "num_samples": Setting(int, 1, lambda n: n >= 1, "a whole number from 1", "texts for each prompt"),
    "seed": Setting(int, 0, lambda s: True, "a whole number", "the same seed draws the same texts"),
    "stop": Setting(
        lambda text: text.replace("\\n", "\n"), [], bool, "a text that is not empty", r"end before it; \n: a line end"
    ),
}
LONG_NAMES = {"max_tokens": "max_new_tokens"}  # the interactive loop takes the short name too


def parse_setting(name: str, text: str) -> Any:
    """The value that `text` gives to a setting. argparse puts the name of the flag before the message.

    Raises:
        argparse.ArgumentTypeError: it is not allowed there.
    """
    setting = SETTINGS[name]
    try:
        value = setting.parse(text)
    except ValueError:
        value = None
    if value is None or not setting.is_right(value):
        raise argparse.ArgumentTypeError(f"{text!r}: must be {setting.must_be}")
    return value


def command_line() -> FlagParser:
    usage = "%(prog)s --checkpoint C [--prompt TEXT] [--FLAG VALUE ...]    (--help explains the flags)"
    parser = FlagParser(usage=usage, description=__doc__)
    add = parser.add_argument
    add("--checkpoint", required=True, help="a checkpoint, a run directory, or a Llama 3 in Hugging Face's layout")
    prompt = parser.add_mutually_exclusive_group()
    prompt.add_argument("--prompt", help="text to continue; - reads standard input (default: ask for it in a terminal)")
    prompt.add_argument("--prompt_file", help="a UTF-8 file with the text to continue")
    for name, setting in SETTINGS.items():
        many = {"action": "append", "metavar": "TEXT"} if name == "stop" else {"metavar": name[0].upper()}
        note = "; may be given again" if name == "stop" else f" (default: {setting.default})"
        kind = partial(parse_setting, name)
        add(f"--{name}", type=kind, default=setting.default, help=setting.help + note, **many)
    add("--cut_prompt", **SWITCH, help="cut a prompt that is longer than the context from the left")
    add("--continuous", **SWITCH, help="go on when the context is full, without the oldest part of the text")
    add(
        "--logprobs",
        choices=("list", "colour"),
        help="show what the model believed: list every token with its "
        "probability on standard error, or colour the text in the terminal (green: 50%% or more, yellow: 10%%, red)",
    )
    add("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps (default: auto)")
    return parser


# ---------------------------------------------------------------- the terminal


def say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def write(text: str) -> None:
    """Write to standard output at once."""
    try:
        print(text, end="", flush=True)
    except OSError as error:  # the reader has gone, or the disk is full
        # Python would try the unwritten rest once more at its exit, and print a traceback.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise OSError(error.errno, f"standard output: {error.strerror}; make room, or write elsewhere") from error


def read_prompt(args: argparse.Namespace) -> str | None:
    """The text to continue. None if a person at a terminal is to be asked.

    One line end at the end of a file or of standard input does not count: nearly every file has it.
    """
    if args.prompt_file is not None:
        try:
            contents = Path(args.prompt_file).read_bytes()
        except OSError as error:
            raise OSError(f"--prompt_file {args.prompt_file}: {error.strerror}; name a file that holds text") from None
    elif args.prompt not in (None, "-"):
        return args.prompt
    elif args.prompt is None and sys.stdin is not None and sys.stdin.isatty():
        return None
    else:
        contents = sys.stdin.buffer.read() if sys.stdin is not None else b""
        if not contents:
            raise ValueError('no prompt: standard input is empty; pass --prompt TEXT ("" for a text from nothing)')
    return contents.decode("utf-8-sig", errors="replace").removesuffix("\n").removesuffix("\r")


def fit_prompt(ids: list[int], context_len: int, args: argparse.Namespace) -> list[int]:
    """`ids`, or the newest of them if they are too many and may be cut.

    Raises:
        ValueError: they are too many.
    """
    if len(ids) < context_len:
        return ids
    if not (args.cut_prompt or args.continuous):
        raise ValueError(
            f"a prompt of {len(ids)} tokens: the model's context takes 1 to {context_len - 1}; shorten it, or let "
            "--cut_prompt drop its beginning"
        )
    kept = drop_oldest(ids, context_len - min(args.max_new_tokens, context_len // 2))
    say(f"the prompt has {len(ids)} tokens; the model sees the last {len(kept)}")
    return kept


def answer(
    model: Transformer, tokenizer: Tokenizer, prompt: str, args: argparse.Namespace, generator: torch.Generator
) -> bool:
    """Write `prompt` and its continuation as it comes. Returns False if Ctrl-C ended it.

    Raises:
        ValueError: the prompt is too long.
    """
    whole, context_len = tokenizer.encode(prompt, bos=True), model.config.max_seq_len
    ids = fit_prompt(whole, context_len, args)
    write(tokenizer.decode(whole[1:]))
    text, beliefs, count, interrupted = TextStream(tokenizer, args.stop), [], 0, False
    began = time.perf_counter()
    try:
        for token, logits in stream_ids(
            model,
            ids,
            max_new_tokens=args.max_new_tokens,
            sampling=Sampling(args.temperature, args.top_p, args.top_k, args.repetition_penalty),
            stop_tokens=tokenizer.stop_tokens,
            generator=generator,
            continuous=args.continuous,
        ):
            count += 1
            piece = text.add(token)
            if args.logprobs == "list":
                beliefs.append(belief(tokenizer, token, logits))
            write(coloured(piece, token, logits) if args.logprobs == "colour" else piece)
            if text.stopped:
                break
    except KeyboardInterrupt:
        interrupted = True
    seconds = time.perf_counter() - began
    write(text.finish() + "\n")
    for line in beliefs:  # after the text, because both may go to one terminal
        say(line)
    full = len(ids) + count == context_len and count < args.max_new_tokens and not args.continuous
    if full and not text.stopped and not interrupted:
        say(f"the context of {context_len} tokens is full; --continuous goes on, without the oldest part of the text")
    say(f"{count / seconds:.1f} tokens/s ({count} in {seconds:.2f} s)")
    return not interrupted


def answers(
    model: Transformer, tokenizer: Tokenizer, prompt: str, args: argparse.Namespace, generator: torch.Generator
) -> bool:
    """As many answers as there should be, with a line between them. Returns False if Ctrl-C ended them."""
    for i in range(args.num_samples):
        if i:
            write(f"----- sample {i + 1} of {args.num_samples}\n")
        if not answer(model, tokenizer, prompt, args, generator):
            return False
    return True


def change_setting(line: str, args: argparse.Namespace, generator: torch.Generator) -> None:
    """Do what a command such as "/top_p 0.9" says."""
    name, _, value = line[1:].partition(" ")
    name = LONG_NAMES.get(name, name)
    if name == "help":
        for name, setting in SETTINGS.items():
            say(f"  /{name:<20} {getattr(args, name)!s:<8} {setting.help}")
        say(
            "  /quit                         or Ctrl-D ends the session; Ctrl-C ends an answer\n"
            "All else is text to continue. Put a space before a text that begins with a slash."
        )
    elif name not in SETTINGS:
        say(f"/{name}: no such command; there are {', '.join('/' + n for n in SETTINGS)}, /help and /quit")
    elif name == "stop" and not value:
        args.stop = []
    else:
        try:
            parsed = parse_setting(name, value)
        except argparse.ArgumentTypeError as error:
            say(f"/{name} {error}")
            return
        setattr(args, name, [parsed] if name == "stop" else parsed)
        if name == "seed":
            generator.manual_seed(parsed % 2**64)


def converse(model: Transformer, tokenizer: Tokenizer, args: argparse.Namespace, generator: torch.Generator) -> None:
    """Continue one line after another, until Ctrl-D. Each line is a prompt of its own."""
    with suppress(ImportError):  # Windows has no readline; its terminal has a history
        import readline  # noqa: F401 (gives input() a history, and keys to edit the line)
    sys.stdin.reconfigure(errors="replace")
    say("This model continues texts. /help shows the settings. Ctrl-C ends an answer, Ctrl-D the session.")
    in_terminal = sys.stdout.isatty()
    while True:
        try:
            if not in_terminal:  # input() would write "> " into the file
                print("> ", end="", file=sys.stderr, flush=True)
            line = input("> " if in_terminal else "")
            if line.strip() == "/quit":
                return
            if line.startswith("/"):
                change_setting(line.rstrip(), args, generator)
            elif line:
                answers(model, tokenizer, line, args, generator)
        except EOFError:
            say("")
            return
        except KeyboardInterrupt:
            say("")
        except (ValueError, MemoryError, torch.OutOfMemoryError) as error:
            say(f"generate.py: {error}")


def main() -> int:
    allow_any_text_in_output()
    parser = command_line()
    args = parser.parse_args()
    if args.logprobs == "colour" and not (sys.stdout is not None and sys.stdout.isatty()):
        parser.error("argument --logprobs: colour needs a terminal as standard output; take --logprobs list")
    try:
        prompt = read_prompt(args)
        device = pick_device(args.device)
        model, checkpoint = load_model(args.checkpoint, device)
        if trained_in := checkpoint.get("dtype"):
            cast_parameters(model, dtype_as_trained(device, trained_in))
        tokenizer = Tokenizer(vocab_size=model.config.vocab_size)
        generator = seeded(args.seed, device)
        if prompt is not None:
            return 0 if answers(model, tokenizer, prompt, args, generator) else 130
        converse(model, tokenizer, args, generator)
        return 0
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # `| head -1` has read enough
        return 141
    except (ValueError, OSError, MemoryError, torch.OutOfMemoryError) as error:
        say(f"generate.py: {error}")
        return 1


if __name__ == "__main__":
    sys.exit(main())
