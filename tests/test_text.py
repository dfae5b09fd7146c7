"""text.py: columns, control characters, and the script a text is written in."""

import pytest

from expander.text import in_wrong_language, printable, table


def test_control_characters_are_replaced_and_newlines_kept():
    assert printable("a\x1b[31m\tb\nc\u2028é") == "a\ufffd[31m\ufffdb\nc\ufffdé"


def test_a_table_aligns_its_first_column_to_the_left_and_the_rest_to_the_right():
    assert table([("", "A", "B"), ("average", "9.5", "10")]) == (
        "             A   B\n  average  9.5  10"
    )


@pytest.mark.parametrize(
    ("query", "text", "wrong"),
    [
        ("auth config", "lex: настройки входа\n", True),
        ("auth config", "lex: настройка oauth\n", False),  # 5 of 14 letters are Latin
        ("λ calculus", "lex: lambda calculus\n", False),  # 1 of 9 letters is Greek
        ("настройка postgresql", "lex: PostgreSQL tuning guide\n", True),
        ("確定申告 医療費控除", "lex: かくていしんこく ひつようしょるい\n", False),
        ("파이썬 가상환경", "vec: 如何创建虚拟环境\n", True),
        ("C++ 20", "lex: 20 25\n", False),  # no letters in the lines
        ("2024 12", "lex: notes\n", False),  # no letters in the query
        ("борщ /only:lex", "lex: рецепт\n", False),  # the suffix is not part of the query
    ],
)
def test_wrong_language_is_judged_by_script(query, text, wrong):
    assert in_wrong_language(query, text) == wrong
