"""Put an exported model on the Hub: no upload without an evaluation, no update without improvement.

OWNER/NAME gets the fused model, its adapters, the evaluation and a model card; OWNER/NAME-gguf the
GGUF files. The evaluation must be of exactly these weights, and its paired difference from the one
published before must lie above zero. Left out: pull requests, branches, making a repository private.
"""

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token
from huggingface_hub.errors import RepositoryNotFoundError

from expander.config import load_config
from expander.convert.formats import write_mlx
from expander.convert.model_card import CARD, EVALUATION, licence, render_card, run_config
from expander.eval.comparison import compare, read_results
from expander.eval.report import CONFIDENCE, summarize
from expander.model import ADAPTER_CONFIG, HUB_ID, Chain, copy_adapters

ADAPTERS = "adapters"
WEIGHTS = (".safetensors", ".gguf", ".bin")


@dataclass(frozen=True)
class Publication:
    """A model that may be published.

    `record` is the evaluation as it will be public: with the verdict and the reason of --force.
    `parent` is the commit that the verdict compared with; None: there is no such repository yet.
    `terms` are those of the base's licence.
    """

    repo: str
    chain: Chain
    record: dict
    parent: str | None
    terms: dict

    @property
    def gguf_repo(self) -> str:
        return f"{self.repo}-gguf"


def scrub(text: str) -> str:
    """`text` without the Hub's token and the path of the user's home folder."""
    for secret, instead in ((get_token(), "***"), (str(Path.home()).rstrip("/"), "~")):
        if secret:
            text = text.replace(secret, instead)
    return text


@contextmanager
def on_the_hub(subject: str, state: str = "") -> Iterator[None]:
    """Whatever fails in the block becomes an OSError of one line, without the token.

    `state` says after the reason what is public now and what to do.
    """
    try:
        yield
    except Exception as error:  # httpx, RuntimeError and the Hub's own types
        reason, cause = str(error) or type(error).__name__, str(error.__cause__ or "")
        if cause not in reason:  # "Error while uploading", and then why
            reason += f" ({cause})"
        reason = " ".join(reason.split())
        raise OSError(scrub(f"{subject}: the Hub failed: {reason}{state}")) from None


def login() -> str:
    """The name of the Hub's login, by its own token file or HF_TOKEN.

    Raises:
        ValueError: there is none.
        OSError: the Hub does not take it.
    """
    if get_token() is None:
        raise ValueError("publishing needs a login to the Hub: run hf auth login, or set HF_TOKEN")
    with on_the_hub("login"):
        return HfApi().whoami()["name"]


def target(push: str | None, chain: Chain, name: str) -> str | None:
    """The repository to publish to; None where nobody asked for it.

    Args:
        push: of the command line; "" is --no-push, None leaves it to the run's own configuration,
            whose `model.push_to_hub: true` means `name` of the Hub's login.
    """
    if push is not None:
        return push or None
    config = run_config(chain)
    if config and load_config("sft", config)[0].model.push_to_hub:
        return f"{login()}/{name}"
    return None


def identity(model: dict) -> dict:
    """The parts of a record's "model" that decide its weights, wherever its folders are."""
    return {
        "base": model.get("revision") and model.get("base"),
        "revision": model.get("revision"),
        "quantisation": model.get("quantize_bits"),
        "adapters": list((model.get("adapters_sha256") or {}).values()),
        "adapter scales": model.get("adapters_scale"),
        "base weights": model.get("weights_sha256"),
    }


def check_weights(record: dict, chain: Chain, evaluation: Path) -> None:
    """Raises ValueError when the evaluation is not of exactly this chain's weights."""
    evaluated = identity(record["model"] or {})
    ours = identity(chain.describe() | {"weights_sha256": chain.base_hashes()})
    if differing := [part for part, value in ours.items() if evaluated[part] != value]:
        raise ValueError(
            f"{evaluation} is not of the weights of {chain.name} "
            f"({', '.join(differing)} differ); evaluate them: python eval.py --model {chain.name} "
            f"-o {evaluation}"
        )


def same(new: dict, old: dict) -> bool:
    """Whether both are one evaluation of the same weights."""
    parts = ("decode", "results")
    return identity(new["model"]) == identity(old["model"] or {}) and all(
        new[part] == old[part] for part in parts
    )


def judge(new: dict, old: dict) -> str:
    """How `new` did against `old`, on the queries that neither was trained on.

    Raises:
        ValueError: the two cannot be compared, or the paired interval does not lie above zero.
    """
    sides = [{result["query"]: result for result in x["results"]} for x in (old, new)]
    if sides[0].keys() != sides[1].keys():
        only_old, only_new = (len(a.keys() - b.keys()) for a, b in (sides, sides[::-1]))
        raise ValueError(
            "not comparable with the published evaluation, which is of other queries: "
            f"{only_old} are only in that one, {only_new} only in this one"
        )
    seen = {query for side in sides for query, result in side.items() if result["trained_on"]}
    if seen == sides[0].keys():
        raise ValueError("not comparable with the published model: every query was trained on")
    result = compare(
        *(
            {**x, "results": [r for r in x["results"] if r["query"] not in seen]}
            for x in (old, new)
        ),
        new["seed"],
    )
    if result["settings"]:
        differing = ", ".join(f"{name} {a} and {b}" for name, (a, b) in result["settings"].items())
        raise ValueError(
            f"not comparable with the published evaluation, which was decoded otherwise: {differing}"
        )
    before, after = (summary["average"] for summary in result["summaries"])
    low, high = result["interval"]
    figures = (
        f"{after:.1f} % against {before:.1f} %, {result['difference']:+.2f} points ({CONFIDENCE} % "
        f"interval {low:+.2f} to {high:+.2f}) over {result['queries']} queries: "
        f"{result['wins']} better, {result['losses']} worse, {result['ties']} the same"
    )
    if low <= 0:
        relation = "worse than" if high < 0 else "not shown to be better than"
        raise ValueError(f"{relation} the published model: {figures}")
    return f"Better than the model it replaced: {figures}."


def published_evaluation(repo: str, revision: str, files: list[str]) -> dict:
    """Raises ValueError when there is none that this version reads."""
    if EVALUATION not in files:
        raise ValueError(f"not comparable: the model that is there has no {EVALUATION}")
    # Not through the cache: the file must be the one that is public now.
    with tempfile.TemporaryDirectory() as folder:
        with on_the_hub(repo):
            path = HfApi().hf_hub_download(repo, EVALUATION, revision=revision, local_dir=folder)
        try:
            return read_results(Path(path))
        except ValueError as error:
            reason = str(error).removeprefix(f"{folder}/")
            raise ValueError(f"not comparable: the published {reason}") from None


def prepare(repo: str, chain: Chain, evaluation: Path | None, force: str | None) -> Publication:
    """Everything that can refuse a publication, before the export and not after it.

    Args:
        evaluation: what eval.py -o wrote; None is evaluation.json in the model's folder.
        force: the reason to publish what `judge` refuses.

    Raises:
        ValueError: no evaluation of exactly these weights, no login, or `judge` refuses.
        OSError: the Hub cannot be reached or does not answer as it should.
    """
    if not HUB_ID.fullmatch(repo):
        raise ValueError(f"--push {repo}: expected OWNER/NAME")
    evaluation = evaluation or Path(chain.name) / EVALUATION
    if not evaluation.is_file():
        raise ValueError(
            f"publishing needs an evaluation and there is no {evaluation}: python eval.py "
            f"--model {chain.name} -o {evaluation}"
        )
    record = read_results(evaluation)
    check_weights(record, chain, evaluation)
    login()
    parent, files = None, []
    with on_the_hub(repo):
        try:
            info = HfApi().model_info(repo)
            parent, files = info.sha, [file.rfilename for file in info.siblings]
        except RepositoryNotFoundError:
            pass
    verdict = "The first model published here."
    if any(name.endswith(WEIGHTS) for name in files):
        try:
            old = published_evaluation(repo, parent, files)
            if same(record, old):
                # Again, or other GGUF types: what was said of this model stays said.
                said = old.get("publication") or {}
                verdict, force = said.get("verdict", verdict), force or said.get("forced")
            else:
                verdict = judge(record, old)
        except ValueError as problem:
            if not force:
                raise ValueError(
                    f'{repo}: {problem}; to publish all the same: --force "the reason"'
                ) from None
            verdict = f"Published although it is {problem}."
    record |= {
        "summary": summarize(record["results"], record["seed"]),
        "publication": {"verdict": verdict, "forced": force},
    }
    with on_the_hub(repo):
        return Publication(repo, chain, record, parent, licence(chain))


def upload(publication: Publication, gguf: list[Path], modelfile: Path) -> None:
    """Send both repositories' files, then make one commit in each, the GGUF files' first.

    Nothing sent is public before its commit. The evaluation, with which the next one is compared,
    is in the last commit: until then the same command finishes what was cut off.

    Raises:
        OSError: the Hub or the way to it failed; the message says what is public.
    """
    chain = publication.chain
    with tempfile.TemporaryDirectory(dir=modelfile.parent, prefix=".push-") as temporary:
        folder = Path(temporary) / "model"
        write_mlx(chain, folder)
        copy_adapters(chain, folder / ADAPTERS)
        paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
        model: dict[str, Path | bytes] = {str(path.relative_to(folder)): path for path in paths}
        for name, path in model.items():
            if path.name == ADAPTER_CONFIG:  # names a local base by its path
                model[name] = scrub(path.read_text(encoding="utf-8")).encode()
        record = json.dumps(publication.record, indent=2, ensure_ascii=False)
        contents = {
            publication.gguf_repo: {path.name: path for path in (*gguf, modelfile)},
            publication.repo: model | {EVALUATION: scrub(record).encode()},
        }
        for repo, files in contents.items():
            text = render_card(
                repo, publication.repo, gguf[0].name, chain, publication.record, publication.terms
            )
            files[CARD] = scrub(text).encode()
        send(publication, contents)


def send(publication: Publication, contents: dict[str, dict[str, Path | bytes]]) -> None:
    """Upload repository → name → content; weights of another model that are there go."""
    api, commits = HfApi(), []
    again = "run the same command again: it sends only what is missing"
    with on_the_hub(publication.repo, f"; nothing of it is public; {again}"):
        for repo, files in contents.items():
            print(f"uploading to {api.endpoint}/{repo}: {len(files)} files", flush=True)
            api.create_repo(repo, exist_ok=True)
            info = api.model_info(repo)
            there = {file.rfilename for file in info.siblings} - files.keys()
            stale = [x for x in there if x.endswith(WEIGHTS) or x.startswith(f"{ADAPTERS}/")]
            additions = [CommitOperationAdd(name, content) for name, content in files.items()]
            api.preupload_lfs_files(repo, additions)
            deletions = [CommitOperationDelete(name, is_folder=False) for name in sorted(stale)]
            # What the verdict compared with must still be there.
            head = (repo == publication.repo and publication.parent) or info.sha
            commits.append((repo, additions + deletions, head))
    summary, public = publication.record["summary"], "nothing of it is public"
    message = f"{summary['average']:.1f} % over {summary['queries']} queries"
    for repo, operations, head in commits:
        with on_the_hub(publication.repo, f"; {public}; {again}"):
            api.create_commit(repo, operations, commit_message=message, parent_commit=head)
        public = f"{repo} is public and {publication.repo} is not"
