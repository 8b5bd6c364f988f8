"""`vramwise calibrate`: what it chooses, how it follows its measuring processes, what it keeps."""

from __future__ import annotations

import dataclasses
import json
import re
import stat
import sys
from pathlib import Path
from textwrap import indent

import pytest

from launcher.commands.calibrate import _show_speed
from launcher.measuring import calibrate
from launcher.measuring.profile import profile_line, read_profiles
from planner.base.errors import InputError, VramwiseError
from planner.calibration.accuracy import shipped_records
from planner.calibration.records import all_records, append_record, read_records
from planner.calibration.speed_fit import SpeedFit
from planner.gpus.catalog import gpu_catalog
from planner.gpus.detect import LocalGpu
from planner.memory.measured.files import coefficients_for
from planner.setup.cuda_allocator import ALLOCATORS, EXPANDABLE, machine_allocator
from planner.throughput.microbenchmarks import own_file
from planner.throughput.rates import Rates, known_rates, rates_for

GIB = 2**30


def gpu(gpu_id: str, *, used_bytes: int = 0) -> LocalGpu:
    return LocalGpu(
        index=0,
        uuid="GPU-test",
        spec=gpu_catalog().get(gpu_id),
        in_catalog=True,
        used_bytes=used_bytes,
        processes=(),
        display_active=False,
    )


@pytest.fixture(autouse=True)
def own_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("VRAMWISE_DATA_DIR", str(tmp_path / "data"))
    return tmp_path / "data"


KERNELS = (
    "print(json.dumps({'event': 'microbenchmark', 'what': 'attention'}))\n"
    "open('calls', 'a').write(' '.join(sys.argv[2:]) + '\\n')\n"
    "os.makedirs(os.path.dirname(sys.argv[4]), exist_ok=True)\n"
    "open(sys.argv[4], 'w').write('measured')\n"
)


def fake_interpreter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str, kernels: str = KERNELS
) -> None:
    """A python that, asked to measure runs, does `body` with the profiles' path and the output's, and asked
    for microbenchmarks `kernels`.
    """
    path = tmp_path / "python"
    branches = f"if 'microbench' in sys.argv[2]:\n{indent(kernels, ' ')}\nelse:\n{indent(body, ' ')}\n"
    start = "import json, os, sys\nprofiles, output = sys.argv[3:5]\n"
    path.write_text(f"#!{sys.executable}\n{start}{branches}")
    monkeypatch.chdir(tmp_path)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setattr(sys, "executable", str(path))


def test_a_small_card_is_asked_for_small_runs_only() -> None:
    unpaged, paged = calibrate.choose(gpu("rtx-4060"), ())
    chosen = [profile.setup.model for profile in (*unpaged, *paged)]
    assert {"qwen2.5-0.5b", "llama-3.2-1b"} <= set(chosen)
    assert not {"llama-3.1-70b", "qwen2.5-14b"} & set(chosen)


def test_what_other_processes_hold_is_not_counted_on() -> None:
    free = calibrate.choose(gpu("rtx-4090"), ())
    busy = calibrate.choose(gpu("rtx-4090", used_bytes=20 * GIB), ())
    assert sum(map(len, busy)) < sum(map(len, free))


def test_what_was_measured_here_is_not_measured_again() -> None:
    card = gpu("h100-80gb")
    record = next(r for r in all_records() if r.environment.gpu_id == "h100-80gb")
    setup = calibrate.PAGED[1].setup
    done = dataclasses.replace(record, setup=setup, allocator=machine_allocator())
    (other,) = set(ALLOCATORS) - {machine_allocator()}
    otherwise = dataclasses.replace(done, allocator=other)
    assert setup in [profile.setup for profile in calibrate.choose(card, ())[1]]
    assert setup in [profile.setup for profile in calibrate.choose(card, (otherwise,))[1]]
    assert setup not in [profile.setup for profile in calibrate.choose(card, (done,))[1]]


def test_runs_of_the_children_are_counted_and_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_interpreter(
        tmp_path,
        monkeypatch,
        "print('a library says hello')\n"
        "for i, _ in enumerate(open(profiles)):\n"
        "    print(json.dumps({'event': 'started', 'index': i}))\n"
        "    outcome = 'refused' if i == 1 else 'ok'\n"
        "    ended = {'event': 'ended', 'index': i, 'outcome': outcome, 'seconds': 1, 'message': ''}\n"
        "    print(json.dumps(ended))",
    )
    said: list[calibrate.Progress] = []
    recorded = calibrate.measure(gpu("h100-80gb"), 5.0, said.append)
    total = len(calibrate.UNPAGED) + len(calibrate.PAGED)
    assert recorded == total - 2
    assert said[-1].ended == said[-1].total == total
    assert any("refused" in progress.text for progress in said)


def test_a_dead_child_is_an_error_that_quotes_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_interpreter(tmp_path, monkeypatch, "sys.stderr.write('no device\\n'); sys.exit(3)")
    with pytest.raises(VramwiseError, match="code 3: no device"):
        calibrate.measure(gpu("h100-80gb"), 5.0, lambda progress: None)


def kernel_calls(tmp_path: Path) -> list[str]:
    calls = tmp_path / "calls"
    return calls.read_text().splitlines() if calls.exists() else []


def test_single_kernels_are_measured_first_and_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_interpreter(tmp_path, monkeypatch, "pass")
    said: list[calibrate.Progress] = []
    card = gpu("h100-80gb")
    calibrate.measure(card, 5.0, said.append)
    assert said[0].text == "microbenchmarks: attention"
    assert own_file("h100-80gb").read_text() == "measured"
    calibrate.measure(card, 5.0, said.append)
    assert len(kernel_calls(tmp_path)) == 1
    calibrate.measure(card, 5.0, said.append, again=True)
    assert len(kernel_calls(tmp_path)) == 2


@pytest.mark.parametrize(("minutes", "seconds"), [(5.0, 40.0), (2.0, 30.0)])
def test_single_kernels_leave_time_for_runs(
    minutes: float, seconds: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_interpreter(tmp_path, monkeypatch, "pass")
    calibrate.measure(gpu("h100-80gb"), minutes, lambda progress: None)
    assert float(kernel_calls(tmp_path)[0].split()[-1]) == seconds


def test_a_minute_is_too_little_for_single_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_interpreter(tmp_path, monkeypatch, "pass")
    calibrate.measure(gpu("h100-80gb"), 1.0, lambda progress: None)
    assert kernel_calls(tmp_path) == []


def test_runs_are_measured_where_single_kernels_cannot_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = "for i, _ in enumerate(open(profiles)):\n"
    body += "    print(json.dumps({'event': 'ended', 'index': i, 'outcome': 'ok'}))"
    fake_interpreter(tmp_path, monkeypatch, body, "sys.stderr.write('no kernel image\\n'); sys.exit(1)")
    said: list[calibrate.Progress] = []
    assert calibrate.measure(gpu("h100-80gb"), 5.0, said.append) > 0
    assert "no kernel image" in said[0].text


def test_a_full_card_is_told_in_one_line() -> None:
    with pytest.raises(InputError, match="too few"):
        calibrate.measure(gpu("rtx-4060", used_bytes=8 * GIB), 5.0, lambda progress: None)


def test_fitting_keeps_coefficients_that_planning_then_uses(own_data: Path) -> None:
    card = gpu("h100-80gb")
    found = calibrate.fit(card)
    kept = json.loads(calibrate.coefficients_file(card).read_text())
    assert kept["name"] == found.coefficients.name == "h100-80gb, calibrated here"
    assert calibrate.coefficients_file(card).is_relative_to(own_data)
    assert found.coefficients.allocator == machine_allocator()
    assert {one.record_id for one in found.residuals} < set(found.coefficients.record_ids)


def test_a_card_never_measured_cannot_be_fitted() -> None:
    with pytest.raises(InputError, match="too few"):
        calibrate.fit(gpu("rtx-3090"))


def test_profiles_survive_the_way_to_the_child(tmp_path: Path) -> None:
    path = tmp_path / "profiles.jsonl"
    profiles = (*calibrate.UNPAGED, *calibrate.PAGED)
    path.write_text("".join(profile_line(profile) + "\n" for profile in profiles))
    assert read_profiles(path) == profiles


def test_every_shipped_record_can_be_read() -> None:
    records = all_records()
    assert len(records) >= 60
    assert len({record.id for record in records}) == len(records)
    from planner.base.data_files import PROFILES

    assert len(list(read_records(PROFILES / "runs" / "h100-80gb.jsonl"))) >= 60


def runs_elsewhere(gpu_id: str, count: int) -> None:
    """Keep timed runs of several models as this machine's own, as if measured on another GPU."""
    timed = [r for r in shipped_records() if r.outcome == "ok" and r.tokens_per_second and r.fills_its_length]
    by_model = {record.setup.model: record for record in timed}
    for record in list(by_model.values())[:count]:
        there = dataclasses.replace(record.environment, gpu_id=gpu_id)
        append_record(
            calibrate.records_file(gpu(gpu_id)),
            dataclasses.replace(record, id=f"own-{record.id}", environment=there),
        )


def test_three_runs_are_enough_for_rates_of_ones_own(capsys: pytest.CaptureFixture[str]) -> None:
    card = gpu("rtx-4090")
    runs_elsewhere("rtx-4090", 2)
    assert calibrate.fit_speed(card) is None
    calibrate.records_file(card).unlink()
    runs_elsewhere("rtx-4090", 3)
    speed = calibrate.fit_speed(card)
    assert speed is not None
    kept = json.loads(calibrate.rates_file(card).read_text())
    assert kept["gpu"] == "rtx-4090"
    assert len(kept["record_ids"]) == 3
    _show_speed(speed)
    assert "rates fitted to 3 runs; median error" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("speed", "said"),
    [(None, "too few timed runs"), ("one model", "rates fitted to 3 runs; one model")],
)
def test_what_cannot_be_judged_is_said(
    speed: str | None, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    found = None
    if speed is not None:
        rates = rates_for(gpu_catalog().get("h100-80gb"))
        assert rates is not None
        found = SpeedFit(rates=dataclasses.replace(rates, record_ids=("a", "b", "c")), residuals=())
    _show_speed(found)
    assert said in capsys.readouterr().out


@pytest.mark.parametrize("text", ["{", "[]", '{"gpu": 3}'])
@pytest.mark.parametrize("folder", ["calibration", "calibration/throughput"])
def test_a_file_that_holds_something_else_is_named(folder: str, text: str, own_data: Path) -> None:
    known_rates.cache_clear()
    coefficients_for.cache_clear()
    path = own_data / folder / "h200.json"
    path.parent.mkdir(parents=True)
    path.write_text(text)
    with pytest.raises(InputError, match=re.escape(str(path))):
        known_rates() if "throughput" in folder else coefficients_for("h200", EXPANDABLE)


def test_rates_from_before_wide_heads_were_told_apart_have_one_for_both() -> None:
    rates = rates_for(gpu_catalog().get("h100-80gb"))
    assert rates is not None
    values = rates.to_dict()
    assert Rates.from_dict(values) == rates
    del values["wide_masked_attention_flop_seconds"]
    found = Rates.from_dict(values)
    assert found.seconds["wide_masked_attention_flop"] == rates.seconds["masked_attention_flop"]
