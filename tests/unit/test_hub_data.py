"""Data sets of the Hub: read from the cache of `datasets`, fetched only with --allow-download."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from launcher.runs.job import JobWish, job_of
from launcher.runs.training_job import SEED
from launcher.tui.screens.start_run import FIELDS, read_wish
from planner.base.errors import FieldError, InputError
from planner.data import files, remembered
from planner.data.hub_data import HubName, hub_name
from planner.data.reader import read_training_data
from planner.planning.make_plan import make_plan
from planner.setup.request import make_request

datasets = pytest.importorskip("datasets")
pytest.importorskip("pyarrow")

Cli = Callable[..., Any]
ASKED = ("plan", "qwen2.5-0.5b", "16GB")
ROWS = [{"prompt": f"{number}?", "completion": str(number)} for number in range(40)]
NOT_HERE = (
    "neither a file here nor a data set in the Hugging Face cache; --allow-download fetches it from the Hub"
)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of `datasets`, on a machine whose sockets lead nowhere."""

    def no_network(*_: object, **__: object) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", no_network)
    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "datasets"


def prepared(cache: Path, repository: str, config: str, splits: dict[str, list[dict[str, Any]]]) -> None:
    """What `datasets` leaves in its cache of a data set that it has loaded, in two shards a split."""
    name = repository.rpartition("/")[2]
    folder = cache / repository.replace("/", "___") / config / "0.0.0" / "0123456789abcdef"
    folder.mkdir(parents=True)
    infos = {}
    for split, rows in splits.items():
        halves = [rows[: len(rows) // 2], rows[len(rows) // 2 :]]
        for number, half in enumerate(halves):
            path = folder / f"{name}-{split}-{number:05}-of-00002.arrow"
            with datasets.arrow_writer.ArrowWriter(path=str(path)) as writer:
                for row in half:
                    writer.write(row)
                writer.finalize()
        infos[split] = {
            "name": split,
            "num_examples": len(rows),
            "dataset_name": name,
            "shard_lengths": [len(half) for half in halves],
        }
    info = {"config_name": config, "dataset_name": name, "splits": infos}
    (folder / "dataset_info.json").write_text(json.dumps(info))


def refused(cli: Cli, *arguments: object) -> str:
    done = cli(*arguments)
    assert (done.code, done.out, done.err.count("\n")) == (2, "", 1), done
    return str(done.err)


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("tatsu-lab/alpaca", HubName("tatsu-lab/alpaca")),
        ("teknium/OpenHermes-2.5", HubName("teknium/OpenHermes-2.5")),
        ("openai/gsm8k/main:test", HubName("openai/gsm8k", "main", "test")),
        ("openai/gsm8k:train[:10%]", HubName("openai/gsm8k", None, "train[:10%]")),
        ("https://huggingface.co/datasets/openai/gsm8k", HubName("openai/gsm8k")),
        ("hf://datasets/openai/gsm8k:test", HubName("openai/gsm8k", None, "test")),
        ("data.jsonl", None),
        ("./tatsu-lab/alpaca", None),
        ("/tatsu-lab/alpaca", None),
        ("../tatsu-lab/alpaca", None),
        ("a/b/c/d", None),
        ("alpaca", None),
        ("a/b:", None),
    ],
)
def test_a_data_set_is_named_as_the_hub_names_it(text: str, name: HubName | None) -> None:
    assert hub_name(text) == name


@pytest.mark.parametrize("named", ["data/train.jsonl", "data/train.parquet", "data/train.csv.gz"])
def test_a_file_s_name_is_no_data_set(named: str, cli: Cli, cache: Path) -> None:
    said = refused(cli, *ASKED, "--data", named)
    assert f"{named}: cannot be read" in said
    assert "No such file or directory" in said


def test_what_is_not_here_is_not_fetched_unless_it_may_be(
    cli: Cli, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetched: list[tuple[object, ...]] = []

    def builder(*asked: object) -> Any:
        fetched.append(asked)
        prepared(cache, "tatsu-lab/alpaca", "default", {"train": ROWS})

        class Builder:
            def download_and_prepare(self) -> None: ...

        return Builder()

    monkeypatch.setattr(datasets, "load_dataset_builder", builder)
    assert f"tatsu-lab/alpaca: {NOT_HERE}" in refused(cli, *ASKED, "--data", "tatsu-lab/alpaca")
    assert not fetched
    asked = (*ASKED, "--data", "tatsu-lab/alpaca", "--json")
    data = json.loads(cli(*asked, "--allow-download").out)["data"]
    assert (data["path"], data["examples"]) == ("tatsu-lab/alpaca/default:train", 40)
    assert fetched == [("tatsu-lab/alpaca", None)]
    # Once it is here it is read, whatever is allowed.
    for more in ((), ("--allow-download",)):
        assert json.loads(cli(*asked, *more).out)["data"] == data
    assert len(fetched) == 1


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (datasets.exceptions.DatasetNotFoundError("Dataset 'a/b' doesn't exist on the Hub"), "doesn't exist"),
        (ConnectionError("Couldn't reach 'a/b' on the Hub (ConnectError)"), "Couldn't reach 'a/b'"),
        (ValueError("Config name is missing.\nPlease pick one"), "Config name is missing."),
        (RuntimeError("Dataset scripts are no longer supported, but found b.py"), "scripts are no longer"),
        (datasets.exceptions.DatasetGenerationError(""), "DatasetGenerationError"),
    ],
)
def test_what_cannot_be_fetched_says_why_in_a_line(
    error: Exception, said: str, cli: Cli, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(datasets, "load_dataset_builder", fail)
    line = refused(cli, *ASKED, "--data", "a/b", "--allow-download")
    assert "a/b: cannot be fetched from the Hub: " in line
    assert said in line


def test_offline_is_offline_even_where_fetching_is_allowed(
    cli: Cli, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    said = refused(cli, *ASKED, "--data", "a/b", "--allow-download")
    assert "a/b: not in the Hugging Face cache, and HF_HUB_OFFLINE is set" in said


@pytest.mark.parametrize(
    ("asked", "path", "examples"),
    [
        ("o/n:train", "o/n/main:train", 40),
        ("o/n", "o/n/main:train", 40),
        ("o/n/main:test", "o/n/main:test", 10),
        ("o/n:train[:5]", "o/n/main:train[:5]", 5),
        ("https://huggingface.co/datasets/o/n", "o/n/main:train", 40),
    ],
)
def test_configuration_and_split_are_chosen_by_name(
    asked: str, path: str, examples: int, cli: Cli, cache: Path
) -> None:
    prepared(cache, "o/n", "main", {"train": ROWS, "test": ROWS[:10]})
    data = json.loads(cli(*ASKED, "--data", asked, "--json").out)["data"]
    assert (data["path"], data["examples"]) == (path, examples)
    assert (
        [each.prompt for each in read_training_data(Path(path)).examples]
        == [  # type: ignore[union-attr]
            row["prompt"] for row in (ROWS if "test" not in asked else ROWS[:10])[:examples]
        ]
    )


def test_what_leaves_a_choice_names_what_there_is(cli: Cli, cache: Path) -> None:
    prepared(cache, "o/splits", "default", {"one": ROWS, "two": ROWS})
    prepared(cache, "o/configs", "main", {"train": ROWS})
    prepared(cache, "o/configs", "socratic", {"train": ROWS})
    said = refused(cli, *ASKED, "--data", "o/splits")
    assert "o/splits: holds the splits one, two; name one, as in o/splits:one" in said
    said = refused(cli, *ASKED, "--data", "o/configs")
    assert (
        "o/configs: has several configurations here (main, socratic); name one, as in o/configs/main" in said
    )
    assert cli(*ASKED, "--data", "o/configs/socratic").code == 0
    prepared(cache, "o/one", "main", {"train": ROWS})
    said = refused(cli, *ASKED, "--data", "o/one/other:train")
    assert (
        "o/one/other:train: neither a file here nor a data set in the Hugging Face cache, which has" in said
    )
    assert "which has o/one/main; --allow-download fetches" in said
    said = refused(cli, *ASKED, "--data", "o/splits:three")
    assert 'Unknown split "three". Should be one of' in said


def test_rows_are_checked_as_those_of_a_file_are(cli: Cli, cache: Path) -> None:
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    prepared(cache, "o/chats", "default", {"train": [{"messages": turns, "id": "7"}] * 20})
    assert "left out: id" in cli(*ASKED, "--data", "o/chats").out
    prepared(cache, "o/images", "default", {"train": [{"messages": turns, "videos": ["a.mp4"]}] * 2})
    said = refused(cli, *ASKED, "--data", "o/images")
    assert "o/images/default:train: row 1: videos: videos and sound are not trained" in said


def test_train_asks_for_it_before_it_reads_anything_else(
    cli: Cli, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("trl")
    monkeypatch.setattr("launcher.runs.weights.require_weights", lambda *_, **__: None)
    asked = ("train", *ASKED[1:])
    assert f"o/n: {NOT_HERE}" in refused(cli, *asked, "--data", "o/n")
    prepared(cache, "o/n", "main", {"train": ROWS, "test": ROWS[:10]})
    said = refused(cli, *asked, "--data", "o/n", "--eval-data", "o/m")
    assert f"o/m: {NOT_HERE}" in said


def test_the_training_process_is_given_the_name_in_full(cache: Path) -> None:
    prepared(cache, "o/n", "main", {"train": ROWS, "test": ROWS[:10]})
    plan = make_plan(make_request("qwen2.5-0.5b", gpu="16GB"), whole=False)
    (cache / "own.jsonl").write_text("{}\n")
    job = job_of(
        plan,
        JobWish(
            model_source="m",
            data=Path(files.on_this_machine("o/n:test")),
            eval_data=(cache / "own.jsonl").relative_to(Path.cwd()),
        ),
    )
    assert (job.data_path, job.seed) == ("o/n/main:test", SEED)
    assert job.eval_data_path == str(cache / "own.jsonl")
    assert len(read_training_data(Path(job.data_path)).examples) == 10


def test_the_form_for_a_run_takes_the_name(cache: Path) -> None:
    texts = {name: "" for name, *_ in FIELDS}
    texts |= {"data": "o/n:test", "model": "m", "runs": str(cache), "epochs": "1"}
    assert read_wish(texts).data == Path("o/n:test")
    with pytest.raises(FieldError, match="a file that exists, a folder, or a data set of the Hub"):
        read_wish({**texts, "data": "o/n.jsonl"})


def test_without_datasets_the_extra_is_named(cli: Cli, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "datasets.packaged_modules.cache.cache", None)
    done = cli(*ASKED, "--data", "o/n")
    assert done.code == 1
    assert (
        "reading a data set of the Hub needs the package datasets; install it with: pip install" in done.err
    )


def test_the_cache_is_read_again_only_when_it_has_changed(
    cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("VRAMWISE_DATA_DIR", str(tmp_path / "own"))
    monkeypatch.setattr(remembered, "LEAST_BYTES", 1)
    prepared(cache, "o/n", "main", {"train": ROWS})
    first = remembered.estimated_lengths(Path("o/n/main:train"))

    def read_again(*_: object) -> Iterable[Any]:
        raise InputError("read again")

    monkeypatch.setattr(files, "cached_batches", read_again)
    assert remembered.estimated_lengths(Path("o/n/main:train")) == first
    with pytest.raises(InputError, match="read again"):
        remembered.estimated_lengths(Path("o/n/main:train[:5]"))
