"""Rule-based scoring of query expansions: no model, no network, only the standard library.

    python reward.py --query "auth config" expansion.txt  score one expansion (`-` reads stdin)
    python reward.py                                      self-test; exits with 1 if a score is off

GRPO trains on this score and `eval.py` reports it; SCORING.md explains it with worked examples. It
measures form and word overlap, not whether an expansion finds the right documents.

Each check returns a list of deductions, one per fault; the points depend on how many there are.
"""

import argparse
import re
import sys
from collections import Counter
from collections.abc import Sequence
from itertools import combinations, islice
from pathlib import Path

LINE_TYPES = ("lex", "vec", "hyde")
STOP_WORDS = frozenset("the a an is are to for of in and or it this that be with as on by".split())
# Query words without a topic: neither key terms nor entities.
KEY_STOP_WORDS = frozenset(
    """
    what is how to the a an in on for of and or with my your do does can i me we who where when
    why which find get show tell about from into between through during after before like than
    then that this their its was were has had been being have not but just also very so if at by
    up out all some any no each every both few more most other only same such here there asked
    said notes meeting email discussion conversation call
    """.split()
)
# Words that are capitalised at the start of a query but are not names.
OPENING_WORDS = frozenset(
    """
    configure setup install build create make run start stop check test debug fix update change
    add remove delete use using need want should would could help please best good new old latest
    recent setting settings compare comparing implement implementing deploy deploying migrate
    migrating optimize optimizing understand understanding explain list describe define convert
    connecting performance overview introduction tutorial example difference between about review
    resolve resolving troubleshoot troubleshooting monitor monitoring manage managing enable
    disable set write read search possible common typical recommended alternative
    """.split()
)
GENERIC_PHRASES = (
    "find information about", "search for", "look up", "get information", "learn about",
    "information on", "details about", "find out about", "what is", "how to", "guide to",
    "help with",
)  # fmt: skip
FILLERS = frozenset(["overview", "basics"])
TECHNICAL = frozenset(".+-#@")
END_MARKER = "<|im_end|>"
CHAT_MARKERS = ("<|im_start|>", END_MARKER, "<|endoftext|>", "\nassistant\n", "\nuser\n")
PARTS = ("format", "diversity", "hyde", "quality", "entity", "think_bonus")
RATINGS = ((80, "Excellent"), (60, "Good"), (40, "Acceptable"), (20, "Poor"))

ONLY_SUFFIX = re.compile(rf"\s+/only:({'|'.join(LINE_TYPES)})\s*$", re.IGNORECASE)
THINK_BLOCK = re.compile(r"<think>.*?</think>", re.DOTALL)
LONG_WORD = re.compile(r"\w{3,}")
# A user turn as expander/prompt.py writes it: "/no_think", an instruction, a colon, the query.
INSTRUCTED = re.compile(r"/no_think [^:\n]*:(.*?)(?:\nQuery intent:.*)?", re.DOTALL)

Part = tuple[int, list[str]]  # points, deductions


def only_mode(query: str) -> tuple[str, str | None]:
    """Split a query into its base and the type that an /only: suffix asks for.

    >>> only_mode("auth config /only:lex"), only_mode("auth config")
    (('auth config', 'lex'), ('auth config', None))
    """
    if match := ONLY_SUFFIX.search(query):
        return query[: match.start()].strip(), match.group(1).lower()
    return query, None


def clean_expansion(text: str) -> tuple[str, bool]:
    """Remove end markers and think blocks; also return whether there was a think block."""
    text = text.strip().replace(END_MARKER, "").strip()
    if "<think>" in text and "</think>" in text:
        return THINK_BLOCK.sub("", text).strip(), True
    return text, False


def parse_expansion(text: str) -> dict[str, list[str]]:
    r"""Group the lines of an expansion by prefix. Only "\n" ends a line.

    >>> parse_expansion("lex: auth settings\nSure!")
    {'lex': ['auth settings'], 'vec': [], 'hyde': [], 'invalid': ['Sure!']}
    """
    parsed: dict[str, list[str]] = {kind: [] for kind in (*LINE_TYPES, "invalid")}
    for line in map(str.strip, text.split("\n")):
        kind, colon, content = line.partition(":")
        if colon and kind in LINE_TYPES:
            parsed[kind].append(content.strip())
        elif line:
            parsed["invalid"].append(line)
    return parsed


def extract_named_entities(query: str) -> set[str]:
    """Find the names, acronyms and technical terms of a query, in lower case.

    >>> sorted(extract_named_entities("configure AWS Lambda with node.js"))
    ['aws', 'lambda', 'node.js']
    """
    entities = set()
    follows_entity = False
    for position, token in enumerate(query.split()):
        word = token.strip(".,!?:;()[]\"'")
        lower = word.lower()
        capital, topical = word[:1].isupper(), lower not in KEY_STOP_WORDS
        if word.isupper() and len(word) >= 2:
            is_entity = True
        elif capital and topical:
            is_entity = position > 0 or lower not in OPENING_WORDS
        elif len(word) >= 2 and not TECHNICAL.isdisjoint(word):
            is_entity = True
        else:
            is_entity = capital and any(map(str.isupper, word[1:]))
        # The word after a name belongs to it ("Lambda timeout"); the one after that does not.
        if is_entity or (word and follows_entity and topical):
            entities.add(lower)
        follows_entity = is_entity
    return entities


def words(text: str) -> set[str]:
    return set(text.lower().split())


def echoes(line: str, query: str) -> bool:
    """Whether the line contains the query and adds fewer than ten characters."""
    line, query = line.lower(), query.lower().strip()
    return query in line and len(line) < len(query) + 10


def is_generic(line: str) -> bool:
    """Whether fewer than three characters are left once a stock phrase's words are removed."""
    line = line.lower()
    for phrase in GENERIC_PHRASES:
        phrase_words = phrase.split()
        if phrase in line or line.startswith(phrase_words[0]):
            rest = line
            for word in phrase_words:
                rest = rest.replace(word, "", 1).strip()
            if len(rest) < 3:
                return True
    return False


def keeps_entity(line: str, entities: set[str]) -> bool:
    lower = line.lower()
    return any(entity in lower for entity in entities)


def find_similar(kind: str, lines: Sequence[str], query: str) -> list[str]:
    """Find pairs of near-identical lines, at most three: a third pair already costs all points."""
    distance = 3 if len(query.split()) >= 5 else 2
    lowered = [(line, line.lower(), words(line)) for line in lines]
    pairs = (
        f'two {kind} lines say the same: "{a}" and "{b}"'
        for (a, a_lower, a_words), (b, b_lower, b_words) in combinations(lowered, 2)
        if a_lower in b_lower or b_lower in a_lower or len(a_words ^ b_words) < distance
    )
    return list(islice(pairs, 3))


def quote(fault: str, lines: Sequence[str]) -> list[str]:
    return [f'{fault}: "{line}"' for line in lines]


def find_echoes(kind: str, lines: Sequence[str], query: str) -> list[str]:
    return quote(f"{kind} line repeats the query", [x for x in lines if echoes(x, query)])


def find_without_key_term(lex: Sequence[str], query: str) -> list[str]:
    terms = words(query) - KEY_STOP_WORDS
    without = [line for line in lex if terms and terms.isdisjoint(words(line))]
    return quote("lex line keeps no key word of the query", without)


def find_without_entity(kind: str, lines: Sequence[str], entities: set[str]) -> list[str]:
    without = [line for line in lines if not keeps_entity(line, entities)]
    return quote(f"{kind} line keeps none of {', '.join(sorted(entities))}", without)


def find_filler(lex: Sequence[str], query: str) -> list[str]:
    fillers = FILLERS - words(query)
    padded = [line for line in lex if not fillers.isdisjoint(words(line))]
    return quote("lex line has filler the query does not ask for", padded)


def find_generic(lex: Sequence[str]) -> list[str]:
    return quote("lex line is only a stock phrase", [line for line in lex if is_generic(line)])


def find_unnatural(vec: Sequence[str]) -> list[str]:
    short = [line for line in vec if " " not in line or len(line) <= 15]
    return quote("vec line is too short for a sentence", short)


def grade(faults: Sequence[str], lines: Sequence[str], every: int, some: int, none: int) -> int:
    """Points if every line, some lines or no line is free of the fault; `lines` is not empty."""
    return every if not faults else some if len(faults) < len(lines) else none


def score_format(lex: list[str], vec: list[str]) -> Part:
    faults = [f"no {kind} line" for kind, lines in (("lex", lex), ("vec", vec)) if not lines]
    return 30 - 10 * len(faults), faults


def score_diversity(query: str, lex: list[str], vec: list[str]) -> Part:
    same_lex, same_vec = find_similar("lex", lex, query), find_similar("vec", vec, query)
    echo_lex, echo_vec = find_echoes("lex", lex, query), find_echoes("vec", vec, query)
    points = (10 if lex and vec else 0) + (5 if len(lex) + len(vec) >= 2 else 0)
    points += max(0, 5 - 2 * len(same_lex)) + max(0, 5 - 2 * len(same_vec))
    points += max(-10, 5 - 10 * len(echo_lex) - 3 * len(echo_vec))
    return points, same_lex + same_vec + echo_lex + echo_vec


def score_hyde(hyde: list[str]) -> Part:
    """Only the first hyde line counts."""
    if not hyde:
        return 0, []
    passage = hyde[0]
    points, faults = 10, []  # 5 for having one, 5 for no newline in it (true of any parsed line)
    if 50 <= len(passage) <= 200:
        points += 5
    else:
        points += 2 if len(passage) < 50 else 0
        faults.append(f"hyde has {len(passage)} characters: 50-200 wanted")
    repetition = 0
    for word, count in Counter(LONG_WORD.findall(passage.lower())).items():
        if count >= 3 and word not in STOP_WORDS:
            repetition += 2 * (count - 2)
            faults.append(f'hyde says "{word}" {count} times')
    return points + max(0, 5 - repetition), faults


def score_quality(query: str, lex: list[str], vec: list[str]) -> Part:
    points, faults = 5, []
    if lex and vec:
        lex_mean, vec_mean = (sum(map(len, lines)) / len(lines) for lines in (lex, vec))
        if lex_mean <= vec_mean:
            points += 5
        else:
            faults.append("lex lines are longer than vec lines on average")
    if vec:
        unnatural = find_unnatural(vec)
        points += 2 if unnatural else 5
        faults += unnatural
    if lex:
        off_topic, filler = find_without_key_term(lex, query), find_filler(lex, query)
        points += grade(off_topic, lex, every=5, some=2, none=0) - 3 * len(filler)
        faults += off_topic + filler
        if any('"' in line for line in lex) and len(query.split()) >= 2:
            points += 3
    return points, faults


def score_entity(entities: set[str], lex: list[str], vec: list[str]) -> Part:
    """The points can be negative; the total includes them as they are."""
    if not entities:
        return 10, []
    if not lex:
        return 0, ["no lex line to keep the query's entities"]
    off_topic, generic = find_without_entity("lex", lex, entities), find_generic(lex)
    everything = " ".join(lex + vec).lower()
    lost = [entity for entity in sorted(entities) if entity not in everything]
    missing = quote("entity is in no lex or vec line", lost)
    points = grade(off_topic, lex, every=15, some=5, none=-30)
    points -= 20 * len(missing) + 15 * len(generic)
    faults = off_topic + missing + generic
    if any(keeps_entity(line, entities) for line in vec):
        points += 5
    else:
        faults.append("no vec line keeps an entity of the query")
    return points, faults


def score_only_format(kind: str, parsed: dict[str, list[str]]) -> Part:
    faults = []
    for other, lines in parsed.items():
        if other != kind:
            faults += quote(f"{other} line where only {kind} is asked for", lines)
    return max(0, 30 - 10 * len(faults)), faults


def score_only_diversity(query: str, kind: str, lines: list[str]) -> Part:
    same, echo = find_similar(kind, lines, query), find_echoes(kind, lines, query)
    points = 30 - 5 * len(same)
    if len(lines) == 1:
        points, same = 15, [f"only one {kind} line: a second one would add points"]
    return max(0, points - 5 * len(echo)), same + echo


def score_only_quality(query: str, kind: str, lines: list[str]) -> Part:
    if kind == "lex":
        off_topic, generic = find_without_key_term(lines, query), find_generic(lines)
        filler = find_filler(lines, query)
        points = 10 + (0 if off_topic else 5) + (0 if generic else 5) - 3 * len(filler)
        return points, off_topic + generic + filler
    if kind == "vec":
        unnatural = find_unnatural(lines)
        return 15 if unnatural else 20, unnatural
    length = len(lines[0])
    if 50 <= length <= 200:
        return 20, []
    fault = f"hyde has {length} characters: 50-200 wanted"
    return 15 if 30 <= length <= 300 else 10, [fault]


def score_only_entity(entities: set[str], kind: str, lines: list[str]) -> Part:
    if not entities:
        return 10, []
    off_topic = find_without_entity(kind, lines, entities)
    return grade(off_topic, lines, every=20, some=15, none=0), off_topic


def score_expansion_detailed(query: str, expansion: str) -> dict:
    """Score one expansion and name every deduction.

    Keys: PARTS, `total`, `max_possible`, `percentage` (0-100), `rating`, `valid` (False if the
    expansion fails the format and so scores 0), `deductions`, `parsed` (the lines by type),
    `entities_detected`, `only_mode` (a type or None).
    """
    base, kind = only_mode(query)
    text, thinking = clean_expansion(expansion)
    parsed = parse_expansion(text)
    fatal = [f"chat marker in the text: {marker!r}" for marker in CHAT_MARKERS if marker in text]
    fatal += [f'line without lex:, vec: or hyde: "{line}"' for line in parsed["invalid"]]
    if fatal:
        parsed = parse_expansion(expansion)
    elif kind and not parsed[kind]:
        fatal = [f"no {kind} line, and only {kind} is asked for"]

    entities = set() if fatal else extract_named_entities(base)
    lex, vec, hyde = parsed["lex"], parsed["vec"], parsed["hyde"]
    think = (0, ["think block in the output"]) if thinking else (20, [])
    if fatal:
        max_possible = 100
        parts = {"format": (0, fatal)}
    elif kind:
        max_possible = 120
        parts = {
            "format": score_only_format(kind, parsed),
            "diversity": score_only_diversity(base, kind, parsed[kind]),
            "quality": score_only_quality(base, kind, parsed[kind]),
            "entity": score_only_entity(entities, kind, parsed[kind]),
            "think_bonus": think,
        }
    else:
        max_possible = 140 if hyde else 120
        parts = {
            "format": score_format(lex, vec),
            "diversity": score_diversity(query, lex, vec),
            "hyde": score_hyde(hyde),
            "quality": score_quality(query, lex, vec),
            "entity": score_entity(entities, lex, vec),
            "think_bonus": think,
        }

    points = dict.fromkeys(PARTS, 0) | {part: earned for part, (earned, _) in parts.items()}
    deductions = [fault for _, faults in parts.values() for fault in faults]
    total = max(0, sum(points.values()))
    percentage = min(100.0, total / max_possible * 100)
    if percentage > 50 and not kind and any(echoes(line, query) for line in lex):
        percentage = 50.0
        deductions.append("percentage held at 50: a lex line repeats the query")
    return points | {
        "entity": max(0, points["entity"]),
        "total": total,
        "max_possible": max_possible,
        "percentage": round(percentage, 1),
        "rating": next((name for minimum, name in RATINGS if percentage >= minimum), "Failed"),
        "valid": not fatal,
        "deductions": deductions,
        "parsed": parsed,
        "entities_detected": sorted(entities),
        "only_mode": kind,
    }


def score_expansion(query: str, expansion: str) -> float:
    """Return total / max_possible, in [0, 1], without the echo cap of `percentage`."""
    result = score_expansion_detailed(query, expansion)
    return min(1.0, result["total"] / result["max_possible"])


def text_of(value: str | list[dict]) -> str:
    """Return a string unchanged; for chat messages, the content of the last one."""
    is_chat = isinstance(value, list) and value and isinstance(value[-1], dict)
    text = value[-1].get("content") if is_chat else value
    if not isinstance(text, str):
        raise ValueError(f"expected text or chat messages with text, found {value!r:.80}")
    return text


def query_of_prompt(prompt: str | list[dict]) -> str:
    """Read the query from a rendered prompt or chat messages; other text is the query itself."""
    turn = text_of(prompt).rpartition("<|im_start|>user\n")[2].partition(END_MARKER)[0].strip()
    instructed = INSTRUCTED.fullmatch(turn)
    return instructed.group(1).strip() if instructed else turn


class QMDRewardFunction:
    """`score_expansion` as a reward function for TRL's GRPOTrainer, which logs its `__name__`."""

    __name__ = "qmd_reward"

    def __call__(self, completions, prompts=None, **kwargs) -> list[float]:
        """Return one reward in [0, 1] per completion.

        Completions and prompts are strings or chat messages. Queries come from the data set's
        `query` or `queries` column if TRL passes one, else from the prompts. Without either they
        are empty, and almost only the form is scored. Raises ValueError if the numbers of
        completions and queries differ or an entry has no text.
        """
        queries = kwargs.get("query", kwargs.get("queries"))
        if queries is None:
            queries = [""] * len(completions) if prompts is None else prompts
            queries = [query_of_prompt(prompt) for prompt in queries]
        if len(queries) != len(completions):
            raise ValueError(f"{len(completions)} completions but {len(queries)} queries")
        return list(map(score_expansion, queries, map(text_of, completions)))


SELF_TEST_KEYS = (*PARTS, "total", "max_possible", "percentage", "rating")
SELF_TEST = (  # name, query, expansion, figures for SELF_TEST_KEYS worked out by hand
    ("no fault", "auth config",
     "hyde: Set the auth provider and the signing key in config.yaml, then restart the server.\n"
     "lex: auth settings file\nlex: login config options\n"
     "vec: how to configure user authentication\nvec: where are the sign-in settings stored",
     (30, 30, 20, 20, 10, 20, 130, 140, 92.9, "Excellent")),
    ("echo, short lines, think block", "auth config",
     "<think>hm</think>hyde: code code code\nlex: auth config\nlex: auth config setup guide\nvec: auth",
     (30, 18, 15, 12, 10, 0, 85, 140, 50.0, "Acceptable")),
    ("entities lost", "Configure AWS Lambda timeouts",
     "lex: AWS Lambda limits\nlex: search for\nvec: how to raise the execution limit of a function",
     (30, 30, 0, 17, 0, 20, 67, 120, 55.8, "Acceptable")),
    ("no vec line, filler, quotes", "fix DNS", 'lex: DNS "server failure" overview',
     (20, 15, 0, 10, 15, 20, 80, 120, 66.7, "Good")),
    ("a line without prefix", "auth config", "Sure!\nlex: auth settings",
     (0, 0, 0, 0, 0, 0, 0, 100, 0.0, "Failed")),
    ("only lex", "auth config /only:lex", "lex: auth keys\nlex: auth keys\nvec: how to sign in",
     (20, 25, 0, 20, 10, 20, 95, 120, 79.2, "Good")),
    ("only vec", "auth config /only:vec", "vec: where the sign-in settings are\nvec: auth",
     (30, 30, 0, 15, 10, 20, 105, 120, 87.5, "Excellent")),
    ("only hyde", "Redis eviction /only:hyde", "hyde: Least recently used keys go first.",
     (30, 15, 0, 15, 0, 20, 80, 120, 66.7, "Good")),
    ("only hyde, none given", "auth config /only:hyde", "lex: auth settings",
     (0, 0, 0, 0, 0, 0, 0, 100, 0.0, "Failed")),
)  # fmt: skip


def self_test() -> list[str]:
    """Score the hand-worked cases; return one line per figure that differs."""
    differences = []
    for name, query, expansion, figures in SELF_TEST:
        result = score_expansion_detailed(query, expansion)
        for key, expected in zip(SELF_TEST_KEYS, figures, strict=True):
            if result[key] != expected:
                differences.append(f"{name}: {key} is {result[key]}, expected {expected}")
    return differences


def main() -> None:
    parser = argparse.ArgumentParser(description="Score an expansion, or run the self-test.")
    parser.add_argument("--query", help="the original query, including any /only: suffix")
    parser.add_argument("file", nargs="?", help="UTF-8 file with the expansion, or - for stdin")
    args = parser.parse_args()
    sys.stdout.reconfigure(errors="backslashreplace")  # for a terminal that is not UTF-8
    if (args.query is None) != (args.file is None):
        parser.error("--query needs a file and a file needs --query; omit both for the self-test")
    if args.query is not None and not (args.query.strip() and args.file):
        parser.error("--query or the file name is empty")
    if args.query is None:
        differences = self_test()
        print(f"self-test: {len(SELF_TEST)} cases, {len(differences)} figures differ")
        sys.exit("\n".join(differences) or None)
    try:
        data = sys.stdin.buffer.read() if args.file == "-" else Path(args.file).read_bytes()
        result = score_expansion_detailed(args.query, data.decode("utf-8-sig"))
    except (OSError, UnicodeDecodeError) as error:
        parser.error(f"cannot read the expansion: {error}")
    lines = [f"{key:13}{result[key]}" for key in SELF_TEST_KEYS]
    lines += [f"- {deduction}" for deduction in result["deductions"]]
    try:
        print("\n".join(lines), flush=True)
    except OSError as error:
        sys.stdout = None  # Python would try again at its end
        broken_pipe = isinstance(error, BrokenPipeError)
        sys.exit(141 if broken_pipe else f"cannot print the score: {error.strerror}")


if __name__ == "__main__":
    main()
