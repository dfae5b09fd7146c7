"""expander/rows.py: every format, broken rows, duplicates, the split, and where rows come from."""

import json
import random
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from expander.prompt import render_lines, render_prompt, render_target, user_message
from expander.queries import base_query, normal_query
from expander.rows import (
    DataError,
    canonical_row,
    find_files,
    load_rows,
    parse_row,
    read_files,
    split_examples,
)

QUERY = "auth config"
LINES = [["lex", "auth settings"], ["vec", "how to configure authentication"], ["hyde", "Auth."]]
ORDERED = (("hyde", "Auth."), ("lex", "auth settings"), ("vec", "how to configure authentication"))
TEXT = "lex: auth settings\nvec: how to configure authentication\nhyde: Auth."
USER = {"role": "user", "content": user_message(QUERY)}
ANSWER = {"role": "assistant", "content": TEXT}
RENDERED = f"{render_prompt(QUERY)}{render_target(ORDERED)}\n"

FORMATS = {
    "canonical": {"query": QUERY, "output": LINES},
    "input/output": {"input": QUERY, "output": TEXT},
    "query/output as text": {"query": QUERY, "output": f"{TEXT}\n"},
    "searches": {"query": QUERY, "searches": [{"type": t, "query": x} for t, x in LINES]},
    "chat": {"messages": [USER, ANSWER]},
    "chat with a system turn": {"messages": [{"role": "system", "content": "S"}, USER, ANSWER]},
    "chat, text null": {"text": None, "messages": [USER, ANSWER]},
    "chat, rendered too": {"text": RENDERED, "messages": [USER, ANSWER]},
    "rendered only": {"text": RENDERED},
    "rendered, messages null": {"text": RENDERED, "messages": None},
    "rendered, no end": {"text": RENDERED.removesuffix("<|im_end|>\n")},
    "prompt/completion": {"prompt": user_message(QUERY), "completion": TEXT},
    "plain prompt": {"prompt": QUERY, "completion": TEXT},
    "rendered prompt": {"prompt": render_prompt(QUERY), "completion": f"{TEXT}<|im_end|>"},
    "prompt as messages": {"prompt": [USER], "completion": [ANSWER]},
    "every other key null": {
        "query": QUERY,
        "output": LINES,
        "input": None,
        "searches": None,
        "messages": None,
        "text": None,
        "prompt": None,
        "completion": None,
        "category": None,
        "intent": None,
        "is_short": None,
    },
}


def jsonl(path: Path, *rows) -> Path:
    """Rows as JSON Lines; text and bytes are written as they are."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        for row in rows:
            if isinstance(row, str):
                row = row.encode()
            elif not isinstance(row, bytes):
                row = json.dumps(row, ensure_ascii=False).encode()
            file.write(row + b"\n")
    return path


def row(query: str) -> dict:
    return {"query": query, "output": [["lex", f"{query} words"]]}


def queries(examples) -> list[str]:
    return [example.query for example in examples]


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_same_example(name):
    example = parse_row(FORMATS[name], "here:1")
    assert (example.query, example.lines) == (QUERY, ORDERED)
    assert (example.category, example.intent, example.source) == (None, None, "here:1")


def test_category_and_intent_are_kept():
    example = parse_row({**FORMATS["canonical"], "category": "technical", "intent": "security"})
    assert (example.query, example.category, example.intent) == (QUERY, "technical", "security")


def test_a_canonical_row_reads_back_as_the_same_example():
    labels = {"category": "technical", "intent": "security", "language": "en"}
    example = parse_row({**FORMATS["canonical"], **labels})
    assert parse_row(canonical_row(example)) == example
    assert canonical_row(example) == {
        "query": QUERY,
        "output": [list(x) for x in ORDERED],
        **labels,
    }


def test_lines_can_keep_the_order_of_the_row():
    assert [list(x) for x in parse_row(FORMATS["searches"], in_order=False).lines] == LINES


@pytest.mark.parametrize("text", ["a <|im_end|> b", "<|im_start|>user", "<think> b </think>"])
def test_text_that_would_break_the_prompt_is_an_error(text):
    with pytest.raises(ValueError, match="text contains"):
        parse_row({"query": QUERY, "output": [["lex", text]]})
    with pytest.raises(ValueError, match="text contains"):
        parse_row({"query": text, "output": [["lex", "a"]]})


@pytest.mark.parametrize("name", ["chat", "rendered only", "prompt/completion"])
def test_an_intent_line_never_reaches_the_query(name):
    plain = json.dumps(FORMATS[name])
    row = json.loads(plain.replace(QUERY, f"{QUERY}\\nQuery intent: security"))
    example = parse_row(row)
    assert (example.query, example.intent, example.lines) == (QUERY, "security", ORDERED)


@pytest.mark.parametrize(
    "think", ["<think>\n\n</think>\n\n", "<think>first lex: a\nthen vec: b</think>\n"]
)
def test_think_blocks_are_removed(think):
    for example in (
        parse_row({"messages": [USER, {"role": "assistant", "content": think + TEXT}]}),
        parse_row({"text": RENDERED.replace("assistant\n", f"assistant\n{think}")}),
        parse_row({"input": QUERY, "output": think + TEXT}),
    ):
        assert example.lines == ORDERED


def test_lines_are_sorted_by_type_and_otherwise_keep_their_order():
    output = [["vec", "v1"], ["lex", "l2"], ["hyde", "h"], ["vec", "v0"], ["lex", "l1"]]
    lines = parse_row({"query": "q", "output": output}).lines
    assert [text for _, text in lines] == ["h", "l2", "l1", "v1", "v0"]


def test_line_breaks_and_outer_white_space_are_removed():
    example = parse_row(
        {"query": "  auth \n config ", "output": [["hyde", " One.\n\nTwo. "], ["lex", " a  b "]]}
    )
    assert example.query == QUERY
    assert example.lines == (("hyde", "One. Two."), ("lex", "a  b"))
    crlf = parse_row({"input": QUERY, "output": TEXT.replace("\n", "\r\n")})
    assert crlf.lines == ORDERED


def test_columns_can_be_named():
    example = parse_row({"conversation": RENDERED}, text_field="conversation")
    assert example.lines == ORDERED
    example = parse_row({"question": QUERY, "completion": TEXT}, prompt_field="question")
    assert example.query == QUERY
    # The original's GRPO file names the chat column as prompt_field.
    assert parse_row(FORMATS["chat"], prompt_field="messages").query == QUERY


def test_a_longer_chat_gives_its_last_answered_turn():
    turns = [
        {"role": "user", "content": user_message("first")},
        {"role": "assistant", "content": "lex: one"},
        USER,
        ANSWER,
        {"role": "user", "content": user_message("never answered")},
    ]
    example = parse_row({"messages": turns})
    assert (example.query, example.lines) == (QUERY, ORDERED)


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        ([1], "a row is an object, found list"),
        ({}, "no known format: found []"),
        ({"text": None}, "no known format: found []"),
        ({"title": "x", "text": None}, "no known format: found ['title']"),
        ({"query": QUERY}, "no known format"),
        ({"query": 7, "output": LINES}, "the query is 7"),
        ({"query": " ", "output": LINES}, "the query is ' '"),
        ({"output": LINES}, "the query is None"),
        ({"query": QUERY, "output": []}, "the expansion has no lines"),
        ({"query": QUERY, "output": "\n"}, "the expansion has no lines"),
        ({"query": QUERY, "output": [["lex"]]}, "not a list of [type, text] pairs"),
        ({"query": QUERY, "output": ["lex: a"]}, "not a list of [type, text] pairs"),
        ({"query": QUERY, "output": [["lix", "a"]]}, "'lix' is not one of hyde, lex, vec"),
        ({"query": QUERY, "output": [[["lex"], "a"]]}, "is not one of hyde, lex, vec"),
        ({"query": QUERY, "output": [["lex", None]]}, "a lex line has no text"),
        ({"query": QUERY, "output": [["vec", " "]]}, "a vec line has no text"),
        ({"query": QUERY, "output": "auth settings"}, "does not start with hyde:, lex: or vec:"),
        ({"query": QUERY, "output": "lex:"}, "a lex line has no text"),
        ({"query": QUERY, "searches": "lex"}, "not a list of {type, query}"),
        ({"query": QUERY, "searches": [{"type": "lex"}]}, "a lex line has no text"),
        ({"messages": "hello"}, "not a list of {role, content}"),
        ({"messages": [USER]}, "no user turn with text and an assistant turn after it"),
        ({"messages": [USER, {"role": "assistant", "content": None}]}, "no user turn with text"),
        ({"text": "no turns at all"}, "no ChatML turns"),
        ({"prompt": [ANSWER], "completion": TEXT}, "no user turn with text"),
        ({"prompt": 1, "completion": TEXT}, "the prompt is int"),
        ({"prompt": QUERY, "completion": 1}, "the completion is not text"),
        ({"messages": [{**USER, "content": user_message("")}, ANSWER]}, "the query is ''"),
        ({"query": "a\ud83d", "output": LINES}, "surrogate"),
        ({"query": QUERY, "output": [["lex", "\udc00"]]}, "surrogate"),
        ({"query": "a\0b", "output": LINES}, "control character U+0000"),
        ({"query": QUERY, "output": [["lex", "a\x1b[31m"]]}, "control character U+001B"),
        ({"query": QUERY, "output": LINES, "intent": "a\0"}, "control character U+0000"),
        ({"query": "\u200b\ufeff", "output": LINES}, "which is empty"),
        ({"query": QUERY, "output": [["lex", "\u200b \u2060"]]}, "a lex line has no text"),
    ],
)
def test_a_broken_row_is_reported_with_the_reason(bad, reason):
    with pytest.raises(ValueError) as caught:
        parse_row(bad)
    assert reason in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"query": "x", "output": [["lex", "a"]]', "not valid JSON (Expecting ',' delimiter"),
        (b"not json", "not valid JSON (Expecting value at column 1)"),
        (b'{"query": "caf\xe9"}', "not UTF-8 (invalid continuation byte at byte 14)"),
        (b'{"query": %s}' % (b"7" * 5000), "not valid JSON"),  # more digits than Python reads
        (b"[" * 200_000, "not valid JSON"),  # deeper than Python recurses
        (b'{"query": "x", "query": "y", "output": []}', "the key 'query' is given twice"),
        (b'{"query": "x", "output": [], "score": NaN}', "NaN is not a finite number"),
        (b'"a text"', "a row is an object, found str"),
        (b'{"query": "x", "output": [["lex", ""]]}', "a lex line has no text"),
    ],
)
def test_a_broken_line_is_reported_with_its_location(line, reason, tmp_path):
    path = jsonl(tmp_path / "rows.jsonl", row("one"), b"", line, row("two"))
    with pytest.raises(DataError) as caught:
        load_rows(str(path))
    assert str(caught.value).startswith(f"{path}:3: ") and reason in str(caught.value)
    assert "more broken" not in str(caught.value)


def test_a_git_lfs_pointer_is_named_once(tmp_path):
    pointer = b"version https://git-lfs.github.com/spec/v1", b"oid sha256:4d7a", b"size 12345"
    path = jsonl(tmp_path / "rows.jsonl", *pointer)
    with pytest.raises(DataError, match=rf"^{path}:1: a Git LFS pointer.*git lfs pull[^(]*$"):
        load_rows(str(path))


@pytest.mark.parametrize("mark", ["\r", "\u2028", "\u2029", "\x85", "\v", "\f", "\r\n", "\n\n"])
def test_every_line_break_in_a_line_is_a_space(mark):
    found = parse_row({"query": f"a{mark}b", "output": [["lex", f"one {mark} two"]]})
    assert found.query == "a b" and found.lines == (("lex", "one two"),)
    [found, *_] = parse_row({"query": "a", "output": f"lex: one{mark.strip(chr(10))}two"}).lines
    assert found[1].split() in (["one", "two"], ["onetwo"])


def test_joiners_and_accents_stay_as_they_are():
    for text in ("می‌خواهم", "👨‍👩‍👧", "cafe\u0301"):
        found = parse_row({"query": text, "output": [["lex", text]]})
        assert found.query == text and found.lines == (("lex", text),)


def test_an_error_is_short_however_long_the_row_is():
    for row in ({"x" * 9999: 1}, {"query": QUERY, "output": [["x" * 9999, "a"]]}):
        with pytest.raises(ValueError) as caught:
            parse_row(row)
        assert len(str(caught.value)) < 400


def test_further_broken_lines_are_counted(tmp_path):
    path = jsonl(tmp_path / "rows.jsonl", "{", row("one"), "}", "[]")
    with pytest.raises(DataError, match=r"rows\.jsonl:1: .* \(and 2 more broken lines\)$"):
        load_rows(str(path))


def test_byte_order_mark_carriage_returns_and_blank_lines_are_ignored(tmp_path):
    path = tmp_path / "rows.jsonl"
    text = "".join(f"{json.dumps(row(q), ensure_ascii=False)}\r\n\r\n" for q in ("one", "zwö"))
    path.write_bytes(b"\xef\xbb\xbf" + text.encode() + json.dumps(row("three")).encode())
    rows = load_rows(str(path))
    assert queries(rows.train) == ["one", "zwö", "three"]
    assert [e.source for e in rows.train] == [f"{path}:{n}" for n in (1, 3, 5)]


def test_a_line_of_a_megabyte_is_read(tmp_path):
    text = "word " * 200_000
    path = jsonl(tmp_path / "rows.jsonl", {"query": "q", "output": [["hyde", text]]}, row("two"))
    [first, _] = load_rows(str(path)).train
    assert first.lines == (("hyde", text.strip()),)


def test_missing_and_empty_data_sets_are_errors(tmp_path):
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "blank.jsonl").write_text("\n \n")
    (tmp_path / "folder").mkdir()
    for name, reason in (
        ("empty.jsonl", "no rows"),
        ("blank.jsonl", "no rows"),
        ("folder", ".jsonl file"),
        ("none.jsonl", "no such file"),
        ("none", "no such file"),
        ("*.json", "no file matches"),
    ):
        with pytest.raises(DataError) as caught:
            load_rows(str(tmp_path / name))
        assert str(tmp_path / name) in str(caught.value) and reason in str(caught.value)


def test_a_name_that_looks_like_a_path_is_never_sent_to_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("data/nothing", "outputs/rows", "./rows", "rows.jsonl", "a/b/c", "rows"):
        with pytest.raises(DataError, match="no such file or folder"):
            load_rows(name)


def test_a_folder_named_like_the_owner_does_not_hide_a_hub_data_set(tmp_path, monkeypatch):
    """`model.output: owner/name` in a file of the original makes such a folder."""
    asked = []
    library = SimpleNamespace(
        disable_progress_bars=lambda: None,
        load_dataset=lambda name, subset, split: asked.append(name) or [],
    )
    monkeypatch.setitem(sys.modules, "datasets", library)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner").mkdir()
    with pytest.raises(DataError, match="no rows"):
        load_rows("owner/rows")
    assert asked == ["owner/rows"]


def test_file_folder_and_glob_give_the_same_rows(tmp_path, rows):
    lines = rows.read_bytes().splitlines()
    jsonl(tmp_path / "one" / "all.jsonl", *lines)
    jsonl(tmp_path / "two" / "a.jsonl", *lines[:9])
    jsonl(tmp_path / "two" / "b.jsonl", *lines[9:])
    (tmp_path / "two" / "notes.txt").write_text("not rows")
    loaded = [
        load_rows(str(tmp_path / name), eval_split=0.25, seed=3)
        for name in ("one/all.jsonl", "one", "one/*.jsonl", "two", "two/*.jsonl", "two/[ab].jsonl")
    ]
    for other in loaded[1:]:
        assert queries(other.train) == queries(loaded[0].train)
        assert queries(other.validation) == queries(loaded[0].validation)
    assert loaded[-1].train[-1].source.startswith(str(tmp_path / "two" / "b.jsonl"))


def test_two_stars_are_every_depth(tmp_path):
    for number, name in enumerate(("top", "a/one", "a/b/two", ".git/three", "a/.four", "a/._one")):
        jsonl(tmp_path / f"{name}.jsonl", row(f"{number}"))
    (tmp_path / "a" / "loop").symlink_to(tmp_path)
    (tmp_path / "a" / "again").symlink_to(tmp_path)
    (tmp_path / "folder.jsonl").mkdir()

    def read(name: str) -> set[str]:
        return set(queries(load_rows(str(tmp_path / name)).train))

    assert read("**/*.jsonl") == read("**") == {"0", "1", "2"}
    assert read("*/**/*.jsonl") == read("a/**/*.jsonl") == {"1", "2"}
    assert read("**/b/*.jsonl") == {"2"} and read("*.jsonl") == {"0"}
    with pytest.raises(DataError, match="no file matches"):
        load_rows(str(tmp_path / "b" / "**" / "*.jsonl"))


def test_hidden_files_are_not_rows(tmp_path):
    for name in (".backup", "._rows"):
        jsonl(tmp_path / f"{name}.jsonl", b"\0\5\26\7\0\2\0\0Mac OS X")
    for name in ("", "*.jsonl", ".[!b]*.jsonl"):
        with pytest.raises(DataError, match="hidden files"):
            load_rows(str(tmp_path / name))
    jsonl(tmp_path / "rows.jsonl", row("one"))
    for name in ("", "*.jsonl", "**/*.jsonl"):
        assert queries(load_rows(str(tmp_path / name)).train) == ["one"]


def test_a_file_that_several_names_lead_to_is_read_once(tmp_path, monkeypatch):
    one = jsonl(tmp_path / "one.jsonl", row("a"))
    (tmp_path / "two.jsonl").symlink_to(one)
    (tmp_path / "three.jsonl").hardlink_to(one)
    monkeypatch.chdir(tmp_path)
    assert find_files(["*.jsonl", "one.jsonl", "./one.jsonl", str(one)]) == [Path("one.jsonl")]
    (tmp_path / "lost.jsonl").symlink_to("nowhere")  # a link without its file is no file
    assert load_rows("*.jsonl").read == 1


def test_names_with_home_and_variables_and_empty_names(tmp_path, monkeypatch):
    jsonl(tmp_path / "one.jsonl", row("a"))
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("~/one.jsonl", "$HOME/one.jsonl", "~", "${HOME}/*.jsonl"):
        assert queries(load_rows(name).train) == ["a"]
    for name, reason in {"": "empty", "$NO_SUCH/a": "not set", "a\0b": "control"}.items():
        with pytest.raises(DataError, match=reason):
            find_files([name])


def test_several_names_give_each_file_once_and_duplicate_rows(tmp_path):
    one = jsonl(tmp_path / "one.jsonl", row("a"), row("A"))
    two = jsonl(tmp_path / "two.jsonl", row("b"))
    names = [str(one), str(tmp_path / "*.jsonl")]
    assert find_files(names) == [one, two]
    assert queries(read_files(names)) == ["a", "A", "b"]
    with pytest.raises(DataError, match="none: no such file"):
        read_files([str(one), "none"])


def test_duplicates_by_case_and_space_are_dropped_before_the_split(tmp_path):
    rows = [row(f"query {i}") for i in range(20)]
    doubled = rows + [row(r["query"].upper()) for r in rows] + [row(" Query  3 ")]
    path = jsonl(tmp_path / "rows.jsonl", *doubled)
    loaded = load_rows(str(path), eval_split=0.3)
    assert (loaded.read, loaded.duplicates) == (41, 21)
    assert (len(loaded.train), len(loaded.validation)) == (14, 6)
    assert all(q.startswith("query ") for q in queries(loaded.train + loaded.validation))
    assert not set(queries(loaded.train)) & set(queries(loaded.validation))


@pytest.mark.parametrize("suffix", [" /only:lex", " /ONLY:Vec", " only: hyde", "  /only: lex  "])
def test_an_only_suffix_is_not_part_of_the_base_query(suffix):
    assert base_query(f"Auth  Config{suffix}") == "auth config"
    assert base_query(f"the word only: lexical{suffix}") == "the word only: lexical"
    assert base_query("read /only:lex files") == "read /only:lex files"


def test_variants_of_a_query_stay_on_one_side():
    rows = []
    for i in range(40):
        for suffix in ("", " /only:lex", " only: vec"):
            rows.append(parse_row(row(f"{'Query' if suffix else 'query'} {i}{suffix}")))
    for seed in range(5):
        shuffled = random.Random(seed).sample(rows, len(rows))
        train, held = split_examples(shuffled, 0.1, seed)
        assert len(held) == 12 and len(train) == 108
        assert not {base_query(e.query) for e in train} & {base_query(e.query) for e in held}
        assert [e for e in shuffled if e in train] == train  # the order stays


def test_the_split_depends_on_the_seed():
    rows = [parse_row(row(f"query {i}")) for i in range(50)]
    one, again, other = (queries(split_examples(rows, 0.2, seed)[1]) for seed in (1, 1, 2))
    assert one == again and one != other and len(one) == 10


@pytest.mark.parametrize(
    ("count", "share", "held"), [(24, 0.1, 2), (3, 0.1, 1), (1, 0.1, 0), (1, 0.5, 0), (24, 0.0, 0)]
)
def test_how_many_are_held_out(count, share, held):
    rows = [parse_row(row(f"query {i}")) for i in range(count)]
    train, validation = split_examples(rows, share, 0)
    assert (len(train), len(validation)) == (count - held, held)


def test_at_least_one_query_is_left_to_train_on():
    rows = [parse_row(row(f"q{suffix}")) for suffix in ("", " /only:lex", " /only:vec")]
    assert split_examples(rows, 0.5, 0) == (rows, [])


def test_a_prepared_folder_keeps_its_own_split(tmp_path):
    jsonl(tmp_path / "train.jsonl", row("one"), row("two /only:lex"), row("three"), row("ONE"))
    jsonl(tmp_path / "val.jsonl", row("Two"), row("four"), row("FOUR"))
    jsonl(tmp_path / "other.jsonl", row("five"))
    loaded = load_rows(str(tmp_path), eval_split=0.5)
    # "two /only:lex" is a variant of a held-out query.
    assert queries(loaded.train) == ["one", "three"]
    assert queries(loaded.validation) == ["Two", "four"]
    assert (loaded.read, loaded.duplicates) == (7, 3)


@pytest.mark.parametrize("held", ["valid", "val", "validation"])
@pytest.mark.parametrize("name", ["", "*.jsonl", "train.jsonl", "**/*.jsonl"])
def test_a_folder_with_the_names_of_mlx_lm_keeps_its_split(held, name, tmp_path):
    jsonl(tmp_path / "train.jsonl", row("one"), row("two"))
    jsonl(tmp_path / f"{held}.jsonl", row("three"))
    jsonl(tmp_path / "test.jsonl", row("four"))
    loaded = load_rows(str(tmp_path / name), eval_split=0.5)
    assert (queries(loaded.train), queries(loaded.validation)) == (["one", "two"], ["three"])


def test_a_prepared_folder_without_validation_rows_is_split(tmp_path):
    jsonl(tmp_path / "train.jsonl", row("one"), row("two"))
    jsonl(tmp_path / "test.jsonl", row("three"))
    loaded = load_rows(str(tmp_path), eval_split=0.5)
    assert len(loaded.train) == len(loaded.validation) == 1 and loaded.read == 2


@pytest.mark.parametrize("held", ["valid", "val", "validation", "test"])
def test_rows_to_validate_or_test_on_are_never_trained_on(held, tmp_path):
    path = jsonl(tmp_path / f"{held}.jsonl", row("one"))
    for name in ("", "*.jsonl", "**/*.jsonl"):
        with pytest.raises(DataError, match=rf"{held}\.jsonl .*train\.jsonl"):
            load_rows(str(tmp_path / name))
    jsonl(tmp_path / "other.jsonl", row("two"))
    with pytest.raises(DataError, match=rf"{held}\.jsonl .*train\.jsonl"):
        load_rows(str(tmp_path))
    assert queries(load_rows(str(path)).train) == ["one"]  # a file that is named is read


def test_two_files_to_validate_on_are_an_error(tmp_path):
    for name in ("train", "valid", "val"):
        jsonl(tmp_path / f"{name}.jsonl", row(name))
    with pytest.raises(DataError, match=r"valid\.jsonl and val\.jsonl"):
        load_rows(str(tmp_path))


def test_one_query_in_several_spellings_is_one_query(tmp_path):
    same = ("café menu", "cafe\u0301 menu", "CAFÉ\u200b menu", "caf\u00ade\u0301 \ufeffmenu")
    joined = ("می‌خواهم", "میخواهم")  # with and without the joiner: two words
    path = jsonl(tmp_path / "rows.jsonl", *map(row, same + joined))
    assert queries(load_rows(str(path)).train) == [same[0], *joined]
    assert normal_query("auth\u200dconfig") == normal_query("authconfig")


def test_max_samples_is_deterministic_and_keeps_the_validation_rows(rows):
    every = load_rows(str(rows), eval_split=0.2)
    some, again, other = (
        load_rows(str(rows), eval_split=0.2, max_samples=5, seed=seed) for seed in (42, 42, 7)
    )
    assert len(some.train) == 5 and queries(some.train) == queries(again.train)
    assert queries(some.train) != queries(other.train)
    assert set(queries(some.train)) < set(queries(every.train))
    assert queries(some.validation) == queries(every.validation)
    assert len(load_rows(str(rows), max_samples=1000).train) == 24


def test_the_summary_counts(tmp_path):
    path = jsonl(tmp_path / "rows.jsonl", *(row(q) for q in "abcdeA"))
    assert load_rows(str(path), eval_split=0.2).summary() == (
        "6 rows read, 1 duplicate queries dropped: 4 to train on, 1 to validate on"
    )


def test_rendered_rows_are_read_back_to_the_same_lines(rows):
    for line in rows.read_text(encoding="utf-8").splitlines():
        original = parse_row(json.loads(line))
        text = render_prompt(original.query) + render_target(original.lines)
        assert parse_row({"text": text}).lines == original.lines
        assert parse_row({"input": original.query, "output": render_lines(original.lines)}) == (
            parse_row({"query": original.query, "output": [list(p) for p in original.lines]})
        )
