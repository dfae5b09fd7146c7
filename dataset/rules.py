"""Rules that make a row from an English question or title and its passage."""

import re
from collections.abc import Sequence
from zlib import crc32

from dataset.gate import Verdict, judge
from expander.prompt import render_lines
from reward import (
    KEY_STOP_WORDS,
    STOP_WORDS,
    echoes,
    find_similar,
    find_without_key_term,
)

STOP = (
    KEY_STOP_WORDS
    | STOP_WORDS
    | frozenset(
        """
        did many much whom whose could would should will might may must these those they he she his
        her him them our us one am because while although however according also used called today
        dr mr mrs ms
        """.split()
    )
)
MAX_KEYWORDS = 8  # per query
HYDE_LENGTHS = range(50, 201)  # characters
MAX_VEC_LENGTH = 160  # characters
SENTENCE_END = re.compile(r"(?:(?<=[.!?])|(?<=[.!?][\"')\]]))\s+(?=[\"'(\[]?[A-Z0-9])|\n+")
# A piece that ends like this is not a whole sentence: the next piece continues it.
ABBREVIATION = re.compile(
    r"(?:^|[\s(])(?:(?:[A-Z]\.)*[A-Z]|Dr|Mr|Mrs|Ms|St|Jr|Sr|vs|No|Prof|Gen|Inc|Ltd|Co|e\.g|i\.e)\.$"
)
# A term of a sentence: a number with its unit, a name of one or more words, or a word.
TERM = re.compile(r"\d[\w.,:/-]*(?: [a-z°%]\w*)?|[A-Z][\w-]+(?: [A-Z][\w-]+)*|[^\W\d][\w-]+")
REFERENCE_MARK = re.compile(r"\[(?:\d+|citation needed)\]")
POINTS_BACK = re.compile(
    r"(?:it|its|he|his|she|her|they|their|this|that|these|those|such|here|there|however|but|and)\b",
    re.IGNORECASE,
)
ASKS = re.compile(
    r"(?:who|whom|whose|what|when|where|which|why|how|is|are|was|were|do|does|did|can|in what|to whom)\b",
    re.IGNORECASE,
)
AUXILIARY = r"is|are|was|were|do|does|did|has|have|had|can|could|will|would|should|may|might"
BE = "is|are|was|were"
DONE = r"\w+ed|born|built|found|given|held|known|made|set|sung|taken|won|written"
# (question without its mark, clause): changes of word order that keep the form of the verb.
CLAUSES = tuple(
    (re.compile(pattern, re.IGNORECASE), clause)
    for pattern, clause in (
        (r"how (?:do|can|should) (?:i|you|we|one) (.+)", r"how to \1"),
        (r"(how to .+)", r"\1"),
        (rf"how many (.+?) ({BE}) there\b(.*)", r"how many \1 there \2\3"),
        (rf"(when|where|how|why) ({BE}) (.+) ({DONE})", r"\1 \3 \2 \4"),
        (
            rf"how (?!many|much)(\w+) ({BE}) (.+?)((?: (?:when|in|before|after|at) .+)?)",
            r"how \1 \3 \2\4",
        ),
        (rf"(?:what|who) (?:{BE}) (the .+)(?<!ed)", r"\1"),
        (rf"(?!.*\b(?:{AUXILIARY})\b)((?:who|what|which) .+)", r"\1"),
    )
)
OPENINGS = ("I want to know", "Tell me", "Find out", "Explain")


def keywords(text: str) -> list[str]:
    """The words that carry the topic, in order, without duplicates.

    >>> keywords("When did the Virgin Mary appear in Lourdes, France?")
    ['Virgin', 'Mary', 'appear', 'Lourdes', 'France']
    """
    found = {}
    for word in text.split():
        word = re.sub(r"['’]s?$", "", word.strip(".,!?:;()[]{}\"'“”‘’«»–—"))
        if word and word.lower() not in STOP and any(map(str.isalnum, word)):
            found.setdefault(word.lower(), word)
    return list(found.values())


def sentences(passage: str) -> list[str]:
    """Split a passage into sentences.

    >>> sentences('Dr. Ada said "1843." It had 7 notes at 20 °C.[2] Was it read in the U.S. then?')
    ['Dr. Ada said "1843."', 'It had 7 notes at 20 °C.', 'Was it read in the U.S. then?']
    """
    found: list[str] = []
    unfinished = False
    for piece in SENTENCE_END.split(REFERENCE_MARK.sub("", passage)):
        piece = " ".join(piece.split())
        if unfinished and piece:
            found[-1] += f" {piece}"
        elif piece:
            found.append(piece)
        unfinished = bool(found and ABBREVIATION.search(found[-1]))
    return found


def count_words(sentence: str, words: Sequence[str]) -> int:
    """How many of the words occur in a sentence."""
    lower = sentence.lower()
    return sum(word.lower() in lower for word in words)


def facts(passage: str, keys: Sequence[str], answers: Sequence[str]) -> list[str]:
    """The sentences that make sense alone, as a hyde line; best first.

    Each has a number or a name, contains half of the keywords and does not refer to an earlier
    sentence. If sentences contain an answer, only those are returned.
    """
    found = sentences(passage)
    answering = [x for x in found if any(answer.lower() in x.lower() for answer in answers)]
    candidates = [
        (-count_words(sentence, keys), position, sentence)
        for position, sentence in enumerate(answering or found)
        if len(sentence) in HYDE_LENGTHS
        and 2 * count_words(sentence, keys) >= len(keys)
        and not sentence.endswith("?")
        and not POINTS_BACK.match(sentence)
        and any(char.isdigit() or char.isupper() for char in sentence[1:])
    ]
    return [sentence for *_, sentence in sorted(candidates)]


def paraphrase(question: str) -> str | None:
    """The question as a request; None if no rule fits.

    >>> paraphrase("When was the Eiffel Tower built?").partition(" when ")[2]
    'the Eiffel Tower was built'
    """
    bare = question.rstrip("?. ")
    for pattern, clause in CLAUSES:
        if match := pattern.fullmatch(bare):
            opening = OPENINGS[crc32(bare.encode()) % len(OPENINGS)]
            request = match.expand(clause)
            return f"{opening} {request[0].lower()}{request[1:]}"
    return None


def new_terms(sentence: str, query: str) -> list[str]:
    """The terms of a sentence that the query does not have, numbers and names first.

    >>> new_terms("Marie Curie found radium in 1898 in 7 tonnes of pitchblende.", "radium found")
    ['Marie Curie', '1898', '7 tonnes', 'pitchblende']
    """
    terms = {}
    for term in TERM.findall(sentence):
        words = [
            w
            for w in term.rstrip(".,:/-").split()
            if w.lower() not in STOP and not count_words(query, [w])
        ]
        if len("".join(words)) > 1:
            terms.setdefault(" ".join(words).lower(), " ".join(words))
    return sorted(terms.values(), key=lambda term: not (term[0].isdigit() or term[0].isupper()))


def lex_lines(query: str, sentence: str) -> list[str]:
    """Up to two keyword lines: keywords of the query with new terms of the sentence."""
    keys = keywords(query)
    names = [key for key in keys if key[0].isupper()]
    others = [key for key in keys if key not in names]
    new = new_terms(sentence, query)
    first = (names + others)[:2] + new[:1]
    rest = names[2:] + others
    # The rubric splits at spaces, so a quoted phrase needs an unquoted word of the query with it.
    if len(names) > 1 and rest and " ".join(names[:2]) in sentence:
        first = [f'"{names[0]} {names[1]}"', rest[0], *new[:1]]
    made: list[str] = []
    for words in (first, (others + names)[-2:] + new[1:2], (names or keys)[:1] + new[2:4]):
        line = " ".join(words)
        fresh = not find_similar("lex", [*made, line], query) and not echoes(line, query)
        if len(made) < 2 and fresh and not find_without_key_term([line], query):
            made.append(line)
    return made


def vec_lines(asked: str, keys: Sequence[str], hyde: str, passage: str) -> list[str]:
    """Up to two vec lines: the question and its paraphrase, or else other sentences of the passage."""
    made = []
    if ASKS.match(asked):
        made = [f"{asked[0].upper()}{asked[1:].rstrip('?. ')}?", paraphrase(asked)]
    others = [
        sentence
        for sentence in sentences(passage)
        if sentence != hyde
        and 2 * count_words(sentence, keys) > len(keys)
        and 15 < len(sentence) <= MAX_VEC_LENGTH
    ]
    others.sort(key=lambda sentence: -count_words(sentence, keys))
    return [*filter(None, made), *others][:2]


def make_row(asked: str, passage: str, answers: Sequence[str], min_score: float) -> Verdict:
    """Make the row of a question or title; without one, the verdict has the reason."""
    asked = " ".join(asked.split())
    keys = keywords(asked)
    if not 1 <= len(keys) <= MAX_KEYWORDS or len(asked) > MAX_VEC_LENGTH:
        return Verdict(None, f"the question has no keywords or more than {MAX_KEYWORDS}")
    query = " ".join(keys) if ASKS.match(asked) else asked.strip(" .?!")
    verdict = Verdict(None, "no sentence of 50-200 characters that states a fact")
    for hyde in facts(passage, keys, answers):
        lex = lex_lines(query, hyde)
        vec = vec_lines(asked, keys, hyde, passage)
        if not lex or not vec:
            verdict = Verdict(None, f"nothing to make {'vec' if lex else 'lex'} lines from")
            continue
        lines = [("hyde", hyde), *(("lex", x) for x in lex), *(("vec", x) for x in vec)]
        verdict = judge(query, render_lines(lines), min_score)
        if verdict.example:
            break
    return verdict
