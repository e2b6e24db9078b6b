"""Text of rows: numbers keep their spelling, what is no text is refused by file, row and column,
and a tokenizer's normaliser reads a text in its own way without dropping any of it."""

import datasets
import pyarrow
import pytest
from pyarrow import parquet
from test_data import table
from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from opdctl.errors import UsageError
from opdctl.models.chat.readable import dropped_characters
from opdctl.rollout.data.hf import Hf
from opdctl.rollout.data.jsonl import Jsonl


def lines(tmp_path, *texts, name="d.jsonl"):
    """A data set of lines as they stand, all for training."""
    path = tmp_path / name
    path.write_bytes(b"".join(t.encode() + b"\n" for t in texts))
    return table(Jsonl, path=str(path), eval_share=0.0)


def answers(data):
    return [p.answer for p in data.prompts("train")]


SPELLINGS = (
    "0.00001",
    "1e-5",
    "1.0",
    "1",
    "1.50",
    "1E+3",
    "-0.0",
    "123456789012345678901234567890",
)
SPELLINGS += ("0.1000000000000000000000001", "true", "false", "1e400"[:3])


def test_numbers_in_json_keep_their_spelling(tmp_path):
    """0.00001 became the reference 1e-05, which no verifier of text or mathematics matches."""
    rows = [f'{{"prompt": "q{i}", "answer": {text}}}' for i, text in enumerate(SPELLINGS)]
    assert answers(lines(tmp_path, *rows)) == list(SPELLINGS)


def test_floats_of_tables_have_no_exponent(tmp_path):
    wide = [0.00001, 1e22, 0.1, 1.0, 123456.789, -2.5e-7]
    text = ["0.00001", "1" + "0" * 22, "0.1", "1.0", "123456.789", "-0.00000025"]
    for kind, expected in (
        (pyarrow.float64(), text),
        (pyarrow.float32(), [*text[:1], "1" + "0" * 22, "0.1", "1.0", "123456.79", text[-1]]),
    ):
        columns = {"prompt": [f"q{i}" for i in range(6)], "answer": pyarrow.array(wide, kind)}
        rows = pyarrow.table(columns)
        parquet.write_table(rows, tmp_path / "d.parquet")
        datasets.Dataset(rows).save_to_disk(str(tmp_path / str(kind)))
        read = table(Jsonl, path=str(tmp_path / "d.parquet"), eval_share=0.0)
        saved = table(Hf, path=str(tmp_path / str(kind)), eval_share=0.0)
        assert answers(read) == answers(saved) == expected
    exact = pyarrow.array(["0.00001", "12.50"]).cast(pyarrow.decimal128(12, 5))
    rows = pyarrow.table({"prompt": ["a", "b"], "answer": exact})
    parquet.write_table(rows, tmp_path / "exact.parquet")
    read = table(Jsonl, path=str(tmp_path / "exact.parquet"), eval_share=0.0)
    assert answers(read) == ["0.00001", "12.50000"]


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("NaN", "column 'answer' holds nan"),
        ("-Infinity", "column 'answer' holds -inf"),
        ("1e999", "column 'answer' holds inf"),
        ("null", "column 'answer' holds None"),
        ("[1]", "column 'answer' holds"),
        ('""', "column 'answer' is empty"),
        ('" \\n"', "column 'answer' is empty"),
        (r'"a\ud83d"', r"column 'answer' holds half a surrogate pair"),
        (r'"\ude00\ud83d"', r"column 'answer' holds half a surrogate pair"),
    ],
)
def test_what_is_no_text_is_refused_by_file_row_and_column(tmp_path, value, words):
    """transformers #43459: half a surrogate pair was a traceback in the middle of a run."""
    data = lines(
        tmp_path, '{"prompt": "p", "answer": "1"}', f'{{"prompt": "q", "answer": {value}}}'
    )
    with pytest.raises(UsageError, match=rf"d\.jsonl, row 2: {words}"):
        data.prompts("train")


def test_what_is_no_text_in_other_tables(tmp_path):
    for answer in (float("nan"), float("inf"), None):
        rows = pyarrow.table({"prompt": ["p", "q"], "answer": [1.0, answer]})
        parquet.write_table(rows, tmp_path / "d.parquet")
        datasets.Dataset(rows).save_to_disk(str(tmp_path / str(answer)))
        for data in (
            table(Jsonl, path=str(tmp_path / "d.parquet")),
            table(Hf, path=str(tmp_path / str(answer))),
        ):
            with pytest.raises(UsageError, match=r"row 2: column 'answer' holds (nan|inf|None)"):
                data.prompts("train")
    cut = pyarrow.array([b"p", b"\xed\xa0\x80"]).view(pyarrow.string())
    rows = pyarrow.table({"prompt": cut, "answer": ["1", "2"]})
    parquet.write_table(rows, tmp_path / "d.parquet")
    with pytest.raises(UsageError, match=r"d\.parquet: a text after row 0 is not UTF-8"):
        table(Jsonl, path=str(tmp_path / "d.parquet")).prompts("train")


def test_surrogates_of_conversations_and_of_verifiers_are_refused(tmp_path):
    talk = r'[{"role": "user", "content": "q"}, {"role": "assistant", "content": "a\udfff"}]'
    (tmp_path / "c.jsonl").write_text(f'{{"turns": {talk}}}\n')
    data = table(Jsonl, path=str(tmp_path / "c.jsonl"), messages_column="turns")
    with pytest.raises(UsageError, match=r"c\.jsonl, row 1: column 'turns' holds half a surr"):
        data.prompts("train")
    (tmp_path / "v.jsonl").write_text(r'{"prompt": "q", "tests": ["assert \"\ud800\""]}' + "\n")
    data = table(Jsonl, "code", path=str(tmp_path / "v.jsonl"), answer_column="")
    with pytest.raises(UsageError, match=r"row 1: a column of the verifier holds half a surr"):
        data.prompts("train")


def test_a_file_and_its_row_are_named_among_shards(tmp_path):
    for i, value in enumerate(('"1"', "NaN")):
        (tmp_path / f"s{i}.jsonl").write_text(f'\n{{"prompt": "q{i}", "answer": {value}}}\n')
    data = table(Jsonl, path=str(tmp_path / "s*.jsonl"))
    with pytest.raises(UsageError, match=r"s1\.jsonl, row 2: column 'answer' holds nan"):
        data.prompts("train")


def test_odd_files_are_read_as_they_stand(tmp_path):
    row = '{"prompt": "q", "answer": "a\\u0000b\\r\\n\\ud83d\\ude00"}'
    read = lines(tmp_path, "\ufeff" + row + "\r")
    assert answers(read) == ["a\x00b\r\n\U0001f600"]
    twice = lines(tmp_path, '{"prompt": "q", "answer": "1", "answer": "2"}')
    with pytest.raises(UsageError, match=r"d\.jsonl:1: .*the key 'answer' stands twice"):
        twice.prompts("train")
    long = "x" * 2**20
    assert answers(lines(tmp_path, f'{{"prompt": "q", "answer": "{long}"}}')) == [long]


def tokenizer(normaliser, alphabet=None):
    """A tokenizer of single characters, or of bytes, with a normaliser."""
    symbols = alphabet or sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(BPE({c: i for i, c in enumerate(symbols)}, []))
    inner.normalizer = normaliser
    if not alphabet:
        inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(tokenizer_object=inner)


LETTERS = "abcdefghijklmnopqrstuvwxyz\u2581\u00e9"
SPACES = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
CONTROLS = normalizers.Replace(Regex("[\\x00-\\x1f\\u200b]"), "")


@pytest.mark.parametrize(
    ("normaliser", "alphabet", "text", "lost"),
    [
        (normalizers.NFC(), None, "cafe\u0301", []),  # e and its accent become one
        (normalizers.NFC(), None, "a\u030a\u0301 \u1100\u1161\u11a8 \u212b \u0958", []),
        (normalizers.NFKC(), None, "\ufb01 \uff11\u00b2 x\u0301\u0323", []),
        (normalizers.NFD(), None, "caf\u00e9", []),
        (normalizers.NFC(), LETTERS, "cafe\u0301", []),
        (normalizers.NFC(), LETTERS, "cafu\u0301", ["\u00fa"]),  # one that the vocabulary lacks
        (normalizers.NFC(), LETTERS, "caf\u4e00", ["\u4e00"]),
        (None, LETTERS, "cafe\u0301", ["\u0301"]),
        (normalizers.Lowercase(), LETTERS, "CAFe", []),
        (normalizers.Lowercase(), LETTERS, "CAF1", ["1"]),
        (SPACES, LETTERS, "a b", []),
        (SPACES, LETTERS, "a 1", ["1"]),
        (normalizers.Replace("a", "b"), LETTERS, "aa", []),
        (CONTROLS, None, "a\x00b", ["\x00"]),
        (CONTROLS, None, "a\u200bb\n", ["\u200b"]),
        (normalizers.BertNormalizer(), None, "a\x07b", ["\x07"]),
        (normalizers.StripAccents(), None, "x\u0301", ["\u0301"]),
        (None, None, "a\x00b\u0301\U0001f600", []),
    ],
)
def test_a_character_is_dropped_only_if_it_leaves_no_trace(normaliser, alphabet, text, lost):
    """tokenizers #1201: a normaliser that joins e and its accent made the text unreadable."""
    assert dropped_characters(tokenizer(normaliser, alphabet), text) == lost


def test_a_model_reads_joined_accents_and_refuses_half_a_pair(model):
    model.tokenizer = tokenizer(normalizers.NFC())
    model.readable.clear()
    model.require_readable("cafe\u0301")
    with pytest.raises(UsageError, match="half a surrogate pair"):
        model.require_readable("a\ud83d")
