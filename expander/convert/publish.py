"""Publish an exported model on the Hub: no upload without an evaluation, no update unless it is better.

OWNER/NAME gets the fused model, its adapters, the evaluation and a model card; OWNER/NAME-gguf gets
the GGUF files. The evaluation must belong to exactly these weights, and the interval of its paired
difference from the published evaluation must lie above zero. Left out: pull requests, branches,
private repositories.
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
from expander.convert.modelfile import PARAMS, TEMPLATE
from expander.eval.comparison import GATE, compare, compare_retrieval, read_results
from expander.eval.measure import summarize
from expander.files import read_json
from expander.model import ADAPTER_CONFIG, HUB_ID, Chain, copy_adapters
from expander.statistics import CONFIDENCE

ADAPTERS = "adapters"
WEIGHTS = (".safetensors", ".gguf", ".bin")
FIRST = "The first model published here."


@dataclass(frozen=True)
class Publication:
    """A model that may be published.

    Attributes:
        record: the evaluation as published, with the verdict and the reason given with --force.
        parent: the commit that the verdict compared with; None if the repository does not exist.
        terms: the base model's licence, from `licence`.
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
    """Remove the Hub token and the path of the user's home folder from a text."""
    for secret, instead in ((get_token(), "***"), (str(Path.home()).rstrip("/"), "~")):
        if secret:
            text = text.replace(secret, instead)
    return text


@contextmanager
def on_the_hub(subject: str, state: str = "") -> Iterator[None]:
    """Turn any error in this context into an OSError of one line, without the token.

    Args:
        subject: the start of the message.
        state: its end, such as what is public now and what to do.
    """
    try:
        yield
    except Exception as error:  # httpx, RuntimeError and the Hub's own types
        reason, cause = str(error) or type(error).__name__, str(error.__cause__ or "")
        if cause not in reason:  # "Error while uploading", and then why
            reason += f" ({cause})"
        reason = " ".join(reason.split())
        raise OSError(scrub(f"{subject}: Hub request failed: {reason}{state}")) from None


def login() -> str:
    """The user name of the Hub login, from the Hub's token file or HF_TOKEN.

    Raises:
        ValueError: not logged in.
        OSError: the Hub rejects the token.
    """
    if get_token() is None:
        raise ValueError("publishing needs a Hub login; run hf auth login or set HF_TOKEN")
    with on_the_hub("login"):
        return HfApi().whoami()["name"]


def target(push: str | None, chain: Chain, name: str) -> str | None:
    """The repository to publish to; None if publishing was not requested.

    Args:
        push: the command line's OWNER/NAME, "" for --no-push, or None. None leaves it to the run's
            configuration: `model.push_to_hub: true` publishes as `name` under the Hub login.
    """
    if push is not None:
        return push or None
    config = run_config(chain)
    if config and load_config("sft", config)[0].model.push_to_hub:
        return f"{login()}/{name}"
    return None


def identity(model: dict) -> dict:
    """The parts of a record's "model" that determine its weights, whatever its folders are named."""
    return {
        "base": model.get("revision") and model.get("base"),
        "revision": model.get("revision"),
        "quantisation": model.get("quantize_bits"),
        "adapters": list((model.get("adapters_sha256") or {}).values()),
        "adapter scales": model.get("adapters_scale"),
        "base weights": model.get("weights_sha256"),
    }


def check_weights(record: dict, chain: Chain, evaluation: Path) -> None:
    """Raise ValueError unless the evaluation belongs to exactly this chain's weights."""
    evaluated = identity(record["model"] or {})
    ours = identity(chain.describe() | {"weights_sha256": chain.base_hashes()})
    if differing := [part for part, value in ours.items() if evaluated[part] != value]:
        raise ValueError(
            f"{evaluation} does not belong to {chain.name} ({', '.join(differing)} differ); "
            f"run python eval.py --model {chain.name} --retrieval -o {evaluation}"
        )


def same(new: dict, old: dict) -> bool:
    """Whether both are the same evaluation of the same weights."""
    parts = ("decode", "results")
    return identity(new["model"]) == identity(old["model"] or {}) and all(
        new[part] == old[part] for part in parts
    )


def judge(new: dict, old: dict) -> str:
    """Compare `new` with `old` on the queries that neither was trained on, and describe the result.

    Raises:
        ValueError: the two cannot be compared, or the paired interval does not lie above zero.
    """
    sides = [{result["query"]: result for result in x["results"]} for x in (old, new)]
    if sides[0].keys() != sides[1].keys():
        only_old, only_new = (len(a.keys() - b.keys()) for a, b in (sides, sides[::-1]))
        raise ValueError(
            "not comparable with the published evaluation, which has other queries: "
            f"{only_old} only there, {only_new} only here"
        )
    seen = {query for side in sides for query, result in side.items() if result["trained_on"]}
    if seen == sides[0].keys():
        raise ValueError("not comparable with the published model: all queries are training data")
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
            "not comparable with the published evaluation, which has other decoding settings: "
            f"{differing}"
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


def judge_search(new: dict, old: dict | None = None) -> None:
    """Refuse a model whose expansions make QMD's search worse on the embedded collection.

    Args:
        old: the published evaluation, if there is one; one without retrieval figures is ignored.

    Raises:
        ValueError: the paired interval over the bare query, or over `old`, lies below zero.
    """
    found = new["retrieval"][GATE]
    change = found["expanded"]["gain"]["ndcg@10"]
    rivals = {"searching with the bare query": (change["mean"], change["interval"])}
    published = compare_retrieval(old, new, new["seed"]).get(GATE, {}) if old else {}
    if "interval" in published:
        rivals["the published model"] = (published["difference"], published["interval"])
    for rival, (difference, (low, high)) in rivals.items():
        if high < 0:
            raise ValueError(
                f"worse for the search than {rival}: nDCG@10 {difference:+.3f} ({CONFIDENCE} % "
                f"interval {low:+.3f} to {high:+.3f}) on evals/{GATE}"
            )


def published_files(repo: str) -> tuple[str | None, list[str]]:
    """The last commit of a repository and its file names; (None, []) if it does not exist."""
    with on_the_hub(repo):
        try:
            info = HfApi().model_info(repo)
        except RepositoryNotFoundError:
            return None, []
        return info.sha, [file.rfilename for file in info.siblings]


def published_evaluation(repo: str, revision: str, files: list[str]) -> dict:
    """The evaluation in a repository. Raise ValueError if this version cannot read it."""
    if EVALUATION not in files:
        raise ValueError(f"not comparable: the published model has no {EVALUATION}")
    # Bypass the cache, to get the file that is public now.
    with tempfile.TemporaryDirectory() as folder:
        with on_the_hub(repo):
            path = HfApi().hf_hub_download(repo, EVALUATION, revision=revision, local_dir=folder)
        try:
            return read_results(Path(path))
        except ValueError as error:
            reason = str(error).removeprefix(f"{folder}/")
            raise ValueError(f"not comparable: the published {reason}") from None


def verdict(
    repo: str, record: dict, parent: str | None, files: list[str], force: str | None
) -> dict:
    """The "publication" entry of `record`: the verdict against the published model, and `force`.

    Raises:
        ValueError: `judge` refuses and there is no `force`.
    """
    try:
        judge_search(record)
        if not any(name.endswith(WEIGHTS) for name in files):
            return {"verdict": FIRST, "forced": force}
        old = published_evaluation(repo, parent, files)
        if same(record, old):  # the same model again, perhaps with other GGUF types
            before = old.get("publication") or {}
            return {
                "verdict": before.get("verdict", FIRST),
                "forced": force or before.get("forced"),
            }
        judge_search(record, old)
        return {"verdict": judge(record, old), "forced": force}
    except ValueError as problem:
        if not force:
            raise ValueError(f'{repo}: {problem}; to publish anyway: --force "REASON"') from None
        return {"verdict": f"Published although it is {problem}.", "forced": force}


def prepare(
    push: str | None, chain: Chain, name: str, evaluation: Path | None, force: str | None
) -> Publication | None:
    """Check all that can refuse a publication, before the export; None if it was not requested.

    Args:
        push, name: as for `target`.
        evaluation: a file from eval.py -o; None is evaluation.json in the model's folder.
        force: the reason to publish a model that `judge` refuses.

    Raises:
        ValueError: no evaluation of exactly these weights, no login, or `judge` refuses.
        OSError: the Hub cannot be reached, or a request failed.
    """
    repo = target(push, chain, name)
    if repo is None:
        if evaluation or force:
            raise ValueError("--evaluation and --force are for publishing; add --push OWNER/NAME")
        return None
    if not HUB_ID.fullmatch(repo):
        raise ValueError(f"--push {repo}: expected OWNER/NAME")
    evaluation = evaluation or Path(chain.name) / EVALUATION
    if not evaluation.is_file():
        raise ValueError(
            f"publishing needs an evaluation and {evaluation} does not exist; run python eval.py "
            f"--model {chain.name} --retrieval -o {evaluation}"
        )
    record = read_results(evaluation)
    if GATE not in (record.get("retrieval") or {}):
        raise ValueError(
            f"publishing needs the retrieval figures of evals/{GATE}, which {evaluation} does not "
            f"have; run python eval.py --model {chain.name} --retrieval -o {evaluation}"
        )
    check_weights(record, chain, evaluation)
    login()
    parent, files = published_files(repo)
    record |= {
        "summary": summarize(record["results"], record["seed"]),
        "publication": verdict(repo, record, parent, files, force),
    }
    with on_the_hub(repo):
        publication = Publication(repo, chain, record, parent, licence(chain))
    print(f"{repo}: {record['publication']['verdict']}")
    return publication


def upload(publication: Publication, gguf: list[Path], modelfile: Path) -> None:
    """Upload the files of both repositories, then commit in each, the GGUF files first.

    Nothing is public before its commit. The evaluation, which the next model is compared with, is in
    the last commit, so after an interruption the same command finishes the upload.

    Raises:
        OSError: a request to the Hub failed; the message includes what is public.
    """
    chain = publication.chain
    with tempfile.TemporaryDirectory(dir=modelfile.parent, prefix=".push-") as temporary:
        folder = Path(temporary) / "model"
        write_mlx(chain, folder)
        copy_adapters(chain, folder / ADAPTERS)
        paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
        model: dict[str, Path | bytes] = {str(path.relative_to(folder)): path for path in paths}
        for name, path in model.items():
            if path.name == ADAPTER_CONFIG:  # holds the path of a local base
                config = read_json(path)
                for place in ("path", "relative"):
                    config.get("base", {}).pop(place, None)
                model[name] = scrub(json.dumps(config, indent=2, ensure_ascii=False)).encode()
        record = json.dumps(publication.record, indent=2, ensure_ascii=False)
        bridge = [modelfile.parent / name for name in (TEMPLATE, PARAMS)]
        contents = {
            publication.gguf_repo: {path.name: path for path in (*gguf, modelfile, *bridge)},
            publication.repo: model | {EVALUATION: scrub(record).encode()},
        }
        for repo, files in contents.items():
            text = render_card(
                repo, publication.repo, gguf[0].name, chain, publication.record, publication.terms
            )
            files[CARD] = scrub(text).encode()
        send(publication, contents)


def send(publication: Publication, contents: dict[str, dict[str, Path | bytes]]) -> None:
    """Upload and commit repository → name → content, and delete weights of a previous model."""
    api, commits = HfApi(), []
    again = "run the same command again to send what is missing"
    with on_the_hub(publication.repo, f"; nothing of it is public; {again}"):
        for repo, files in contents.items():
            print(f"uploading to {api.endpoint}/{repo}: {len(files)} files", flush=True)
            api.create_repo(repo, exist_ok=True)
            info = api.model_info(repo)
            others = {file.rfilename for file in info.siblings} - files.keys()
            old = [x for x in others if x.endswith(WEIGHTS) or x.startswith(f"{ADAPTERS}/")]
            additions = [CommitOperationAdd(name, content) for name, content in files.items()]
            api.preupload_lfs_files(repo, additions)
            deletions = [CommitOperationDelete(name, is_folder=False) for name in sorted(old)]
            # The commit fails if the repository has changed since the verdict.
            head = (repo == publication.repo and publication.parent) or info.sha
            commits.append((repo, additions + deletions, head))
    summary, public = publication.record["summary"], "nothing of it is public"
    message = f"{summary['average']:.1f} % over {summary['queries']} queries"
    for repo, operations, head in commits:
        with on_the_hub(publication.repo, f"; {public}; {again}"):
            api.create_commit(repo, operations, commit_message=message, parent_commit=head)
        public = f"{repo} is public and {publication.repo} is not"
