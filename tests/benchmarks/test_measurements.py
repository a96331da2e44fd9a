"""The benchmarks run, and what they compare is equal work: figures of a broken comparison would be worse than none."""

from __future__ import annotations

import json

import pytest

from tests.benchmarks.loop_overhead import TOLERANCE, averaging_overhead, loop_overhead
from tests.benchmarks.measuring import Effort, Figure, Load, Measured, Measurement, median_ratio, pairs_in_turn
from tests.benchmarks.processes import run_python
from tests.benchmarks.ray_overhead import TrialTimes, pauses_between
from tests.benchmarks.registry import MEASUREMENTS
from tests.benchmarks.run import as_text, main, measure

SMALLEST = Effort(1, smallest=True)
IDLE, BUSY = Load(0.02, 0.1), Load(0.7, 3.0)


def figures(name: str) -> dict[str, Figure]:
    measured = MEASUREMENTS[name].run(SMALLEST)
    json.dumps(measured.facts)
    return measured.figures


# ------------------------------------------------------------------------------------------------ what they share


def test_pairs_run_in_turn() -> None:
    order: list[str] = []

    def run(name: str, seconds: float) -> float:
        order.append(name)
        return seconds

    pairs = pairs_in_turn(lambda: run("a", 2.0), lambda: run("b", 3.0), 3)
    assert order == ["a", "b"] * 3
    assert median_ratio(pairs) == 1.5


def test_a_ratio_is_the_median_of_the_pairs_own_ratios() -> None:
    assert median_ratio([(1.0, 2.0), (10.0, 30.0), (1.0, 9.0)]) == 3.0


def test_a_figure_says_whether_its_bound_is_met() -> None:
    assert [Figure(v, "s", at_most=2.0).met for v in (1.9, 2.0, 2.1)] == [True, True, False]
    assert [Figure(v, "×", at_least=2.0).met for v in (1.9, 2.0, 2.1)] == [False, True, True]
    assert Figure(1.0, "s").met is None
    assert Figure(3.0, "s", at_most=2.0).as_json() == {"value": 3.0, "unit": "s", "at_most": 2.0, "met": False}


def test_a_busy_machine_and_a_missed_bound_are_said() -> None:
    measured = Measured({"start": Figure(0.5, "s", at_most=0.3), "size": Figure(7, "MB")})
    quiet = as_text("title", measured, Effort(5), 1.0, (IDLE, IDLE))
    assert "warning" not in quiet
    assert "at most 0.3" in quiet
    assert quiet.count("MISSED") == 1
    for loads in ((BUSY, IDLE), (IDLE, BUSY)):
        assert "warning: the machine was not idle" in as_text("title", measured, Effort(5), 1.0, loads)
    assert "mean nothing" in as_text("title", measured, SMALLEST, 1.0, (IDLE, IDLE))


def test_a_measurement_is_printed_and_recorded_with_the_load_around_it(capsys: pytest.CaptureFixture[str]) -> None:
    asked: list[Effort] = []

    def run(effort: Effort) -> Measured:
        asked.append(effort)
        return Measured({"size": Figure(7, "MB")}, {"samples": [7]})

    told = measure("size", Measurement("how big", run, repeats=5, minutes=1), None)
    assert asked == [Effort(5)]
    assert told["figures"] == {"size": {"value": 7, "unit": "MB"}}
    assert set(told["load"]) == {"before", "after", "idle"}
    assert (told["repeats"], told["facts"]) == (5, {"samples": [7]})
    assert "size: how big (5 repeats" in capsys.readouterr().out


def test_an_unknown_measurement_is_refused_before_any_runs(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["light", "speed"])
    assert ended.value.code == 2
    assert "unknown measurement speed; expected some of light," in capsys.readouterr().err


def test_a_command_that_fails_is_no_figure() -> None:
    with pytest.raises(RuntimeError, match=r"ended with 3: said\nwhy"):
        run_python(["-c", "import sys; print('said'); sys.exit(sys.stderr.write('why') and 3)"])


def test_the_memory_of_a_command_is_its_own_and_not_that_of_who_started_it() -> None:
    ours = bytearray(150_000_000)
    small = run_python(["-c", "import time; time.sleep(0.2)"], watch="own")
    large = run_python(["-c", "import time; held = bytearray(90_000_000); time.sleep(0.2)"], watch="own")
    assert small.peak_bytes < 50e6
    assert 90e6 < large.peak_bytes < len(ours)


def test_the_memory_of_a_family_counts_children() -> None:
    child = "import time; held = bytearray(90_000_000); time.sleep(1.5)"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', '{child}'])"
    family = run_python(["-c", parent], watch="family")
    assert family.peak_bytes > 90e6


# ------------------------------------------------------------------------------------------------ the measurements


def test_light_commands_are_timed() -> None:
    told = figures("light")
    assert {name: figure.at_most for name, figure in told.items()} == {
        "--help": 0.6,
        "--plan, embedded default": None,
    }
    assert all(0 < figure.value < 60 for figure in told.values())


def test_no_two_rows_of_the_wide_study_share_a_stage() -> None:
    measured = MEASUREMENTS["wide-plan"].run(SMALLEST)
    assert measured.facts["cells"] == 16
    assert measured.facts["shared_stages"] == 0
    assert 20 < measured.figures["most memory"].value < 1000


def test_images_are_decoded_read_and_waited_for() -> None:
    told = figures("images")
    assert {name for name, figure in told.items() if figure.met is not None} == {
        "over decoding 1024 px PNGs",
        "the same, flipped at random",
        "building, over a plain pass of Pillow",
        "waiting in an epoch of head training",
    }
    assert 0 < told["waiting in an epoch of head training"].value < 1
    assert told["over decoding 1024 px PNGs"].value > 1


@pytest.mark.slow
def test_metrics_in_the_ledger_are_counted_and_timed() -> None:
    measured = MEASUREMENTS["ledger"].run(SMALLEST)
    assert measured.facts["metrics_an_epoch"] == 50
    assert measured.figures["a metric"].at_most == 150
    assert all(figure.value > 0 for figure in measured.figures.values())


@pytest.mark.slow
def test_a_report_is_written_and_verified() -> None:
    measured = MEASUREMENTS["report"].run(SMALLEST)
    assert "the tables are those of the ledger" in measured.facts["verify_said"]
    assert measured.facts["values"] == 2 * 2 * 3 * 20
    assert measured.figures["report"].at_most == 5


@pytest.mark.slow
def test_the_plain_loop_ends_with_the_weights_of_ours() -> None:
    told = loop_overhead(SMALLEST).figures
    assert told["largest difference of any weight"].value <= TOLERANCE
    assert told["over the plain loop"].at_most == 0.05


@pytest.mark.slow
def test_five_averaged_copies_are_timed_on_steps_of_stage_2_alone() -> None:
    measured = averaging_overhead(SMALLEST)
    assert len(measured.facts["steps_none_and_five_seconds"]) == 2, "the smallest stage 2 has two epochs"
    for (none, five), (whole_none, whole_five) in zip(
        measured.facts["steps_none_and_five_seconds"], measured.facts["epochs_none_and_five_seconds"], strict=True
    ):
        assert none < whole_none
        assert five < whole_five


def test_trials_that_overlap_are_no_measure_of_one_slot() -> None:
    trials = [TrialTimes(10.0, 12.0, 2), TrialTimes(12.5, 14.0, 2), TrialTimes(15.0, 16.0, 1)]
    assert pauses_between(trials) == (0.5, 1.0)
    with pytest.raises(RuntimeError, match=r"trials overlap by 1\.00 s"):
        pauses_between([trials[0], TrialTimes(11.0, 13.0, 2)])
