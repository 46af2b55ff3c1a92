"""The tokenizer against Meta's class, Hugging Face's tokenizers and bare tiktoken, all built from the same file."""

import itertools
import random
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import tiktoken
from llama_models.llama3.tokenizer import Tokenizer as MetaTokenizer
from tiktoken.load import load_tiktoken_bpe
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import TikTokenConverter

from tokenizer import DEFAULT_PATH, Tokenizer

NESTED_SIZES = (512, 8192, 50_000)

STRINGS = [
    "",
    "a",
    " ",
    "\n",
    "\0",
    "a\0b\0\0",
    "\ufeffBOM first",
    "Hello, world!",
    "The quick brown fox jumps over the lazy dog.",
    "antidisestablishmentarianism pneumonoultramicroscopicsilicovolcanoconiosis",
    # contractions, both cases, straight and curly, and the long s, which folds to s
    "I'm you're he's she'd we'll they've can't",
    "I'M YOU'RE HE'S SHE'D WE'LL THEY'VE CAN'T",
    "I'm'll'Ve 's 'S 't'T 'x ''ll",
    "HE'SAID I'LLAMA x'rester Y'DEF",  # cut after the contraction although letters follow
    "it’s don’t o’clock",
    "'ſ I'ſ",
    # digits
    "1 12 123 1234 12345 123456 1234567",
    "3.14159, 1,000,000 and 1e-10; 0xDEADBEEF 0b1010",
    "2024-02-29T23:59:60.000+00:00",
    "٠١٢٣٤٥٦٧٨٩ ०१२३४५६७८९ ๐๑๒๓",
    "½ ² ³ Ⅻ ① ㊿ 千九百",
    "a1b22c333d4444",
    # white space
    "  two leading, two trailing  ",
    "a  b   c    d",
    "\t\tif x:\n\t\t\treturn\n",
    "one\n\ntwo\n\n\nthree\n",
    "CR\rLF\nCRLF\r\nmixed\r\r\n\n\r",
    "one \r two\r \r three \r\tfour",
    "line \r\n  \r\n   end   \n",
    " \n \n  \t \n",
    "no-break\u00a0space, em\u2003space, ideographic\u3000space, zero\u200bwidth",
    "line\u2028separator paragraph\u2029separator next\u0085line",
    "form\x0cfeed vertical\x0btab file\x1cseparator unit\x1fseparator",
    " " * 200 + "x" + " " * 87,
    "\n" * 150,
    # code
    "def f(x: int) -> str:\n    return f'{x!r:>10}'  # comment\n",
    "for (int i = 0; i < n; ++i) { a[i] <<= 2; }",
    "SELECT * FROM t WHERE x != 'it''s' -- why\n;",
    '<p class="a">&nbsp;&amp;</p><!-- no -->',
    '{"key": [1, 2.5e3, null, "\\u00e9\\n"]}',
    "snake_case camelCase PascalCase SCREAMING_CASE kebab-case",
    "https://example.org/a/b?c=d&e=%20f#g user@example.org C:\\Temp\\x.txt",
    r"\frac{1}{2}\sum_{i=0}^{\infty} x_i \quad \$5",
    "!!!???...---___===***///\\\\\\|||~~~```",
    "?!\n\n ;;\r\n ...x",
    # what looks like a control token
    "<|begin_of_text|>",
    "a<|end_of_text|>b <|eot_id|><|eom_id|>",
    "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>",
    "<|reserved_special_token_0|><|finetune_right_pad_id|><|python_tag|><|image|>",
    "<|begin_of_text <|nonsense|> |> <||>",
    "<s></s>[INST]<unk><pad>",
    # scripts
    "Crème brûlée, façade, naïve, Ærøskøbing, Łódź, İstanbul, straße STRASSE",
    "Η γρήγορη καφέ αλεπού",
    "Съешь же ещё этих мягких французских булок",
    "Հայերեն լեզու",
    "ქართული ენა",
    "עברית: שָׁלוֹם עולם",
    "العربية: السَّلامُ عَلَيْكُم ـــ لا",
    "فارسی: می‌خواهم",
    "mixed \u202bעברית 123\u202c and \u200fRTL\u200e marks",
    "हिन्दी में क्षत्रिय",
    "বাংলা தமிழ் తెలుగు ಕನ್ನಡ മലയാളം",
    "ภาษาไทยไม่มีช่องว่าง",
    "བོད་ཡིག ខ្មែរ မြန်မာ ລາວ",
    "中文没有空格。简体与繁體！",
    "日本語のテキスト、カタカナとひらがな。ｶﾅ ＡＢＣ１２３",
    "한국어 문장입니다. 각 각",
    "አማርኛ ᏣᎳᎩ ᐃᓄᒃᑎᑐᑦ",
    "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𝟙𝟚𝟛 𐍈 𒀀 𠜎",
    # combining marks, emoji, and the edges of Unicode
    "e\u0301 e\u0301\u0302\u0303 a\u0308ffin \u0301alone",
    "Z͑ͫ̓ͪ̂ͫ̽a̴l̷g̸o",
    "👩‍👩‍👧‍👦 🏳️‍🌈 👍🏽 🇩🇪🇫🇷 1️⃣ ❤️ ☎︎",
    "😀😀😀text😀",
    "→ ∀x∈ℝ: ⌈x⌉ ≤ ∞ ± √2 € £ ¥ ™ ©",
    "\ue000 \U0010ffff \ufffd \ufffe \U000e0041",
]


@pytest.fixture(scope="module")
def ours():
    return Tokenizer()


@pytest.fixture(scope="module")
def metas():
    return MetaTokenizer(DEFAULT_PATH)


@pytest.fixture(scope="module")
def hugging_face():
    special_tokens = MetaTokenizer(DEFAULT_PATH).special_tokens
    converted = TikTokenConverter(
        str(DEFAULT_PATH), pattern=MetaTokenizer.pat_str, extra_special_tokens=list(special_tokens)
    ).converted()
    return PreTrainedTokenizerFast(tokenizer_object=converted, split_special_tokens=True)


def random_strings(count, seed=0):
    """Strings of 0 to 40 characters, each from three blocks of Unicode. No surrogates: UTF-8 cannot hold them."""
    rng = random.Random(seed)
    blocks = [(0x20, 0x7E)] * 6 + [
        (0x00, 0x20),  # controls and white space
        (0x30, 0x39),
        (0x80, 0x24F),
        (0x300, 0x36F),  # combining marks
        (0x370, 0x5FF),
        (0x600, 0x6FF),
        (0x900, 0xDFF),
        (0x2000, 0x206F),  # spaces, joiners and direction marks
        (0x3040, 0x30FF),
        (0x4E00, 0x9FFF),
        (0xAC00, 0xD7A3),
        (0x1F300, 0x1FAFF),
        (0x00, 0xD7FF),
        (0xE000, 0x10FFFF),
    ]
    for _ in range(count):
        chosen = rng.sample(blocks, 3)
        yield "".join(chr(rng.randint(*rng.choice(chosen))) for _ in range(rng.randint(0, 40)))


def first_difference(a, b):
    """Where two lists begin to differ. pytest's own diff of a hundred thousand ids takes minutes."""
    if a == b:
        return None
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


# ---------------------------------------------------------------- the same ids as others


@pytest.mark.parametrize("text", STRINGS, ids=ascii)
def test_ids_equal_those_of_meta_and_hugging_face(text, ours, metas, hugging_face):
    ids = ours.encode(text)
    assert ids == metas.encode(text, bos=False, eos=False)
    assert ids == hugging_face.encode(text, add_special_tokens=False)
    assert ours.decode(ids) == text


def test_there_are_at_least_sixty_different_strings():
    assert len(set(STRINGS)) == len(STRINGS) >= 60


def test_random_unicode_comes_back_and_has_the_peers_ids_and_no_control_ids(ours, metas, hugging_face):
    compared = 0
    for text in random_strings(10_000):
        ids = ours.encode(text)
        assert ours.decode(ids) == text
        assert ids == metas.encode(text, bos=False, eos=False)
        assert max(ids, default=0) < 128_000
        # A code point without a character (Cn) may become a letter in a later version of Unicode. Hugging Face's
        # tokenizers and tiktoken have different versions.
        if all(unicodedata.category(c) != "Cn" for c in text):
            assert ids == hugging_face.encode(text, add_special_tokens=False)
            compared += 1
    assert compared > 5000


LETTERS = "".join(random.Random(3).choices("etaoinshrdlu", k=60_000))  # no pattern, so every cut shows in the ids
BLANKS = "".join(random.Random(4).choices(" \t\n\u3000", k=60_000))

LONG_TEXTS = {
    **{f"{n} equal letters": "a" * n for n in (25_000, 25_001, 60_000)},
    **{f"{n} spaces": " " * n for n in (25_000, 25_001, 60_000)},
    **{f"{n} letters": LETTERS[:n] for n in (25_000, 25_001, 50_000, 50_001, 60_000)},
    **{f"{n} blanks": BLANKS[:n] for n in (25_000, 25_001, 50_000, 50_001, 60_000)},
    "60000 line ends": "\n" * 60_000,
    "60000 digits": "1234567" * 8572,
    "60000 emoji": "😀" * 60_000,
    "letters, spaces, letters": "ab" * 15_000 + " " * 30_000 + "c" * 25_001 + " d",
    "runs that just fit": (LETTERS[:25_000] + BLANKS[:25_000]) * 3,
    "runs one too long": (LETTERS[:25_001] + BLANKS[:25_001]) * 3,
    "a long run inside prose": "some words " * 3000 + "-" * 26_000 + " and more words" * 3000,
    "separators that only Unicode counts as space": "\x1c" * 26_000 + "\u3000" * 26_000 + "\u200b" * 26_000,
    "400001 characters of prose": ("It's 12345 words, and then\n\n some. " * 12_000)[:400_001],
    "a word across the 400000th character": "ab " * 133_332 + "international " * 100,
    "a run across the 400000th character": "ab " * 130_000 + LETTERS + " end",
    "900000 characters, mixed": ("αβγ 中文 " * 40_000 + "0" * 30_000 + " " * 30_000) * 3,
}


def test_every_short_mix_of_kinds_of_characters_has_metas_ids(ours, metas):
    kinds = ["a", "7", "!", "'", " ", "\t", "\n", "\r", "\u2028", "é"]
    for length in range(1, 6):
        for characters in itertools.product(kinds, repeat=length):
            text = "".join(characters)
            assert ours.encode(text) == metas.encode(text, bos=False, eos=False), repr(text)


def document_ids(tokenizer, text):
    return np.concatenate(tokenizer.encode_document(text)).tolist()


@pytest.mark.parametrize("name", LONG_TEXTS)
def test_long_texts_have_metas_ids(name, ours, metas):
    text = LONG_TEXTS[name]
    ids = ours.encode(text)
    assert first_difference(ids, metas.encode(text, bos=False, eos=False)) is None
    assert first_difference(document_ids(ours, text), [ours.bos_id, *ids, ours.eos_id]) is None
    assert ours.decode(ids) == text


@pytest.mark.parametrize("name", ["60000 letters", "60000 blanks", "a word across the 400000th character"])
def test_the_cuts_of_long_texts_show_in_their_ids(name, ours):
    """If the cuts did not show, the test above would pass without any cut."""
    whole = tiktoken.Encoding(
        "whole", pat_str=MetaTokenizer.pat_str, mergeable_ranks=load_tiktoken_bpe(str(DEFAULT_PATH)), special_tokens={}
    )
    assert first_difference(ours.encode(LONG_TEXTS[name]), whole.encode_ordinary(LONG_TEXTS[name])) is not None


@pytest.mark.parametrize("character", ["a", " ", "\n", "=", "9", "\u00e9", "😀"], ids=ascii)
def test_a_million_equal_characters_are_encoded(character, ours):
    assert ours.token_byte_lengths()[ours.encode(character * 1_000_000)].sum() == 1_000_000 * len(character.encode())


# ---------------------------------------------------------------- control ids


def test_special_tokens_stand_where_meta_and_hugging_face_have_them(ours, metas, hugging_face):
    assert ours.special_tokens == metas.special_tokens
    assert len(ours.special_tokens) == 256
    assert hugging_face.convert_tokens_to_ids(list(ours.special_tokens)) == list(ours.special_tokens.values())


@pytest.mark.parametrize("name", ["bos_id", "eos_id", "pad_id", "stop_tokens"])
def test_named_ids_equal_metas(name, ours, metas):
    assert getattr(ours, name) == getattr(metas, name)


def test_whole_vocabulary_has_128256_ids(ours, metas, hugging_face):
    assert ours.vocab_size == metas.n_words == len(hugging_face) == 128_256


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("eos", [False, True])
@pytest.mark.parametrize("text", ["", "some text", "<|begin_of_text|>", "x" * 30_000], ids=lambda text: text[:20])
def test_begin_and_end_ids_stand_once_at_the_ends(text, bos, eos, ours, metas):
    ids = ours.encode(text, bos=bos, eos=eos)
    assert ids == metas.encode(text, bos=bos, eos=eos)
    assert ids == [ours.bos_id] * bos + ours.encode(text) + [ours.eos_id] * eos


@pytest.mark.parametrize("size", [None, *NESTED_SIZES])
def test_text_never_becomes_a_control_id(size, metas):
    tokenizer = Tokenizer(vocab_size=size)
    for name in metas.special_tokens:
        for text in (name, f"x{name}y", f" {name}\n"):
            ids = tokenizer.encode(text)
            assert max(ids) < tokenizer.vocab_size - 256
            assert max(document_ids(tokenizer, text)[1:-1]) < tokenizer.vocab_size - 256
            assert tokenizer.decode(ids) == text


def test_control_ids_are_decoded_to_their_names(ours):
    assert ours.decode(ours.encode("Hi", bos=True, eos=True)) == "<|begin_of_text|>Hi<|end_of_text|>"


# ---------------------------------------------------------------- documents, broken text, broken ids


@pytest.mark.parametrize("size", [None, 512])
def test_a_document_is_its_text_between_begin_and_end(size):
    tokenizer = Tokenizer(vocab_size=size)
    for text in [*STRINGS, *random_strings(500, seed=1)]:
        pieces = tokenizer.encode_document(text)
        assert {piece.dtype.name for piece in pieces} == {"uint32"}
        assert len(pieces) <= 3
        assert document_ids(tokenizer, text) == tokenizer.encode(text, bos=True, eos=True)


SURROGATES = {
    "alone": "\ud800",
    "inside": "a\udfffb",
    "last": "end \ud83d",
    "pair in the wrong order": "\udc00\ud800",
    "many": "\ude00" * 1000,
    "before a cut": "\ud83d" + LETTERS,
}


@pytest.mark.parametrize("text", SURROGATES.values(), ids=SURROGATES)
def test_lone_surrogates_become_replacement_characters(text, ours):
    expected = "".join("\ufffd" if "\ud800" <= c <= "\udfff" else c for c in text)
    assert ours.decode(ours.encode(text)) == expected


@pytest.mark.parametrize("text", SURROGATES.values(), ids=SURROGATES)
def test_a_document_with_lone_surrogates_raises_an_error(text, ours):
    """JSON can hold them ("\\ud83d"), so a web crawl has some."""
    with pytest.raises(UnicodeEncodeError):
        ours.encode_document(text)


@pytest.mark.parametrize("ids", [[-1], [128_256], [5, 6, 2**40], [0, -(2**70)]])
def test_decoding_refuses_ids_outside_the_vocabulary_and_names_them(ids, ours):
    with pytest.raises(ValueError, match=f"{ids[-1]}.*128256"):
        ours.decode(ids)


def test_decoding_takes_arrays_and_half_characters(ours):
    ids = ours.encode("naïve 中文 😀")
    assert ours.decode(np.array(ids, dtype=np.uint32)) == "naïve 中文 😀"
    half = ours.encode("😀")[:1]  # the emoji has several ids, so its first id is no whole character
    assert "\ufffd" in ours.decode(half)
    assert ours.decode([]) == ""


# ---------------------------------------------------------------- smaller vocabularies


@pytest.fixture(scope="module", params=NESTED_SIZES)
def nested(request):
    """A smaller tokenizer, and one that tiktoken makes from the same ranks."""
    ranks = load_tiktoken_bpe(str(DEFAULT_PATH))
    kept = {token: rank for token, rank in ranks.items() if rank < request.param - 256}
    peer = tiktoken.Encoding("peer", pat_str=MetaTokenizer.pat_str, mergeable_ranks=kept, special_tokens={})
    return Tokenizer(vocab_size=request.param), peer


def test_nested_ids_equal_those_of_tiktoken_with_the_same_ranks(nested):
    tokenizer, peer = nested
    for text in [*STRINGS, *random_strings(1000, seed=2)]:
        ids = tokenizer.encode(text)
        assert ids == peer.encode_ordinary(text)
        assert max(ids, default=0) < tokenizer.vocab_size - 256
        assert tokenizer.decode(ids) == text


def test_nested_control_ids_are_the_last_256_in_metas_order(nested, metas):
    tokenizer, _ = nested
    size = tokenizer.vocab_size
    assert list(tokenizer.special_tokens) == list(metas.special_tokens)
    assert list(tokenizer.special_tokens.values()) == list(range(size - 256, size))
    shift = 128_256 - size
    assert (tokenizer.bos_id, tokenizer.eos_id) == (metas.bos_id - shift, metas.eos_id - shift)
    assert tokenizer.pad_id == metas.pad_id - shift
    assert tokenizer.stop_tokens == [i - shift for i in metas.stop_tokens]
    with pytest.raises(ValueError, match=str(size)):
        tokenizer.decode([size])


def test_smallest_vocabulary_is_bytes():
    tokenizer = Tokenizer(vocab_size=512)
    assert len(tokenizer.encode("naïve 😀")) == len("naïve 😀".encode())
    assert sorted(tokenizer.token_byte_lengths().tolist()) == [0] * 256 + [1] * 256


@pytest.mark.parametrize("size", [0, -1, 511, 256, 128_257, 10**9])
def test_vocabulary_sizes_out_of_range_are_refused_by_value(size):
    with pytest.raises(ValueError, match=f"vocab_size={size}\\b.*512.*128256"):
        Tokenizer(vocab_size=size)


@pytest.mark.parametrize("size", [512, 513, 128_255, 128_256])
def test_vocabulary_sizes_at_the_edges_are_taken(size):
    tokenizer = Tokenizer(vocab_size=size)
    assert tokenizer.vocab_size == size
    assert max(tokenizer.special_tokens.values()) == size - 1


# ---------------------------------------------------------------- the file


def test_a_missing_file_is_refused_by_name(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.model"):
        Tokenizer(tmp_path / "nowhere.model")


def test_a_folder_in_the_files_place_is_refused_by_name(tmp_path):
    with pytest.raises(OSError, match=tmp_path.name):
        Tokenizer(tmp_path)


def one_bit_flipped(contents):
    return contents[:1000] + bytes([contents[1000] ^ 1]) + contents[1001:]


@pytest.mark.parametrize(
    "damage",
    [
        lambda contents: b"",
        lambda contents: contents[:-1000],
        lambda contents: contents + b"\n",
        lambda contents: contents.replace(b"\n", b"\r\n"),
        lambda contents: b"<html>404</html>",
        one_bit_flipped,
    ],
    ids=["empty", "cut short", "one byte more", "CRLF", "error page", "one bit flipped"],
)
def test_a_wrong_file_is_refused_by_name(damage, tmp_path):
    path = tmp_path / "damaged.model"
    path.write_bytes(damage(DEFAULT_PATH.read_bytes()))
    with pytest.raises(ValueError, match=r"damaged\.model"):
        Tokenizer(path)


def test_the_file_may_be_anywhere_and_its_path_may_be_a_string(tmp_path, ours):
    path = tmp_path / "copy.model"
    path.write_bytes(DEFAULT_PATH.read_bytes())
    assert Tokenizer(str(path)).encode("Anywhere") == ours.encode("Anywhere")
    assert Path(DEFAULT_PATH).is_absolute()  # so that scripts work from any folder


# ---------------------------------------------------------------- byte lengths and fingerprint


@pytest.mark.parametrize("size", [None, *NESTED_SIZES])
def test_byte_lengths_are_those_of_the_tokens(size, metas):
    tokenizer = Tokenizer(vocab_size=size)
    text_tokens = tokenizer.vocab_size - 256
    lengths = tokenizer.token_byte_lengths()
    assert lengths.shape == (tokenizer.vocab_size,)
    assert lengths.dtype == np.int64
    expected = [len(metas.model.decode_single_token_bytes(i)) for i in range(text_tokens)]
    assert lengths[:text_tokens].tolist() == expected
    assert not lengths[text_tokens:].any()


@pytest.mark.parametrize("size", [None, *NESTED_SIZES])
def test_byte_lengths_of_a_document_sum_to_its_bytes(size):
    tokenizer = Tokenizer(vocab_size=size)
    for text in STRINGS:
        assert tokenizer.token_byte_lengths()[document_ids(tokenizer, text)].sum() == len(text.encode())


def test_the_fingerprint_depends_on_the_vocabulary_size_alone(tmp_path):
    copy = tmp_path / "copy.model"
    copy.write_bytes(DEFAULT_PATH.read_bytes())
    prints = {size: Tokenizer(vocab_size=size).fingerprint for size in (512, 513, 8192, 128_256)}
    assert len(set(prints.values())) == 4
    assert Tokenizer(copy, vocab_size=8192).fingerprint == prints[8192]
    assert Tokenizer().fingerprint == prints[128_256]
    assert all(isinstance(text, str) and text.isascii() and text for text in prints.values())


def test_the_fingerprint_equals_the_one_in_existing_manifests():
    """If you change the fingerprint on purpose, users must prepare their shards again. Say so where they read it."""
    assert Tokenizer().fingerprint.startswith("cf96ac4b215420d9")
    assert Tokenizer(vocab_size=8192).fingerprint.startswith("3e3afb3b0e4f1c37")
