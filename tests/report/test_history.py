"""The history and results in a ledger whose events are written by hand."""

import json

import numpy as np

from iumad_jax.metrics import forgetting
from iumad_jax.report.effects import in_one_line
from iumad_jax.report.history import history, results
from iumad_jax.report.tables import METRICS


def evaluation(step, object_, method, value, error=0.03):
    """Return an evaluation whose intervals end 0.1 below and 0.2 above the value."""
    ends = [None, None] if value is None else [value - 0.1, value + 0.2]
    spread = {"intervals": dict.fromkeys(METRICS, ends), "standard_errors": dict.fromkeys(METRICS, error)}
    spread["kinds"] = {"dent": {"images": 2, "i_auroc": value}}
    place = {"step": step, "object": object_, "method": method}
    return {"event": "evaluation", **place, **dict.fromkeys(METRICS, value), **spread}


def decisions(step, threshold):
    return {"event": "decisions", "step": step, "quantile": 0.9, "objects": {"bee": {"image": threshold}}}


def snapshot(step, size):
    return {"event": "snapshot", "step": step, "bytes": {"net": size, "baseline": 1}, "strategy_bytes": 10 * size}


EVENTS = [
    {"event": "step", "step": 0, "act": "learn", "objects": ["bee", "ant"], "images": 5},
    {"event": "epoch", "step": 0, "epoch": 0, "loss": 1.0},
    evaluation(0, "bee", "net", 0.9),
    evaluation(0, "bee", "baseline", 0.4),
    evaluation(0, "ant", "net", None, None),  # undefined
    evaluation(0, "ant", "baseline", None, None),
    decisions(0, 0.5),
    snapshot(0, 100),
    {"event": "step", "step": 1, "act": "learn", "objects": ["cow"], "images": 3},
    evaluation(1, "bee", "net", 0.7),
    evaluation(1, "bee", "baseline", 0.4),
    evaluation(1, "cow", "net", 0.8, 0.04),  # ant has no test images in this step
    evaluation(1, "cow", "baseline", 0.2),
    decisions(1, 0.6),
    snapshot(1, 200),
    {"event": "step", "step": 2, "act": "learn", "objects": ["dog"], "images": 3},
    evaluation(2, "bee", "net", 0.1),  # the step is not finished
]
NAN = np.nan


def test_matrices_and_decisions_are_those_of_finished_steps():
    past = history(EVENTS)
    assert past.steps == (("bee", "ant"), ("cow",))
    assert past.objects == ("bee", "ant", "cow")
    assert list(past.matrices) == ["net", "baseline"]
    for metric in METRICS:
        np.testing.assert_array_equal(past.matrices["net"][metric], [[0.9, NAN, NAN], [0.7, NAN, 0.8]])
        np.testing.assert_array_equal(past.matrices["baseline"][metric], [[0.4, NAN, NAN], [0.4, NAN, 0.2]])
    assert [step["objects"]["bee"]["image"] for step in past.decisions] == [0.5, 0.6]
    assert (past.bytes, past.strategy_bytes) == ({"net": 200, "baseline": 1}, 2000)


def test_intervals_are_those_of_the_last_finished_step():
    intervals = history(EVENTS).intervals["net"]["aupro"]
    np.testing.assert_allclose(intervals["objects"], [[0.6, 0.9], [NAN, NAN], [0.7, 1.0]])
    mean, margin = (0.7 + 0.8) / 2, 1.96 * 0.05 / 2  # the errors 0.03 and 0.04 add up to 0.05
    np.testing.assert_allclose(intervals["mean"], [mean - margin, mean + margin])
    np.testing.assert_allclose(history(EVENTS, last_step=0).intervals["net"]["aupro"]["objects"][0], [0.8, 1.1])
    run = results({"method": "net", "protocol": "2-1"}, history(EVENTS), seconds=3.5)
    assert run["intervals"]["aupro"]["mean"] == intervals["mean"]
    np.testing.assert_allclose(run["baselines"]["baseline"]["intervals"]["aupro"]["objects"][2], [0.1, 0.4])


def test_kinds_of_defects_are_those_of_each_objects_last_test():
    run = results({"method": "net", "protocol": "2-1"}, history(EVENTS), seconds=3.5)
    assert {name: kinds["dent"]["i_auroc"] for name, kinds in run["kinds"].items()} == {
        "bee": 0.7,
        "ant": None,
        "cow": 0.8,
    }
    assert run["baselines"]["baseline"]["kinds"]["cow"] == {"dent": {"images": 2, "i_auroc": 0.2}}
    before_kinds = [{key: value for key, value in event.items() if key != "kinds"} for event in EVENTS]
    assert not any(results({"method": "net", "protocol": "2-1"}, history(before_kinds), 3.5)["kinds"].values())


def test_history_until_an_earlier_step():
    past = history(EVENTS, last_step=0)
    assert past.steps == (("bee", "ant"),)
    np.testing.assert_array_equal(past.matrices["net"]["aupro"], [[0.9, NAN]])
    assert (len(past.decisions), past.strategy_bytes) == (1, 1000)


def test_history_without_a_finished_step_is_empty():
    past = history(EVENTS[:4])
    assert (past.steps, past.matrices, past.decisions) == ((), {}, [])


def test_results_contain_the_history():
    run = results({"method": "net", "protocol": "2-1"}, history(EVENTS), seconds=3.5)
    assert json.loads(json.dumps(run["steps"])) == [["bee", "ant"], ["cow"]]
    assert (run["seconds"], run["bytes"], run["baselines"]["baseline"]["bytes"]) == (3.5, 200, 1)
    matrix = np.array(run["matrix"]["i_auroc"])
    assert run["summary"]["i_auroc"]["fm"] == forgetting(matrix)
    assert round(run["summary"]["i_auroc"]["fm"], 6) == 0.2


def test_steps_that_train_nothing_do_not_count_in_forgetting():
    """Bee lost 0.2 when cow was learned; that ant is retired afterwards changes no figure."""
    retired = [
        {"event": "step", "step": 2, "act": "retire", "objects": ["ant"], "images": 0},
        {"event": "decisions", "step": 2, "objects": {name: {"image": 3} for name in ("bee", "ant", "cow")}},
        snapshot(2, 200),
    ]
    before, after = (
        results({"method": "net", "protocol": "2-1"}, history(events), 1.0)["summary"]["i_auroc"]
        for events in (EVENTS[:15], EVENTS[:15] + retired)
    )
    assert after == before
    assert round(after["fm"], 6) == 0.2


def test_objects_that_were_not_tested_keep_their_last_values():
    """Only cow is updated, and then tested, in step 2; step 3 retires ant."""
    rates = {"false_alarms": 0.2, "misses": 0.0}
    record = {"bee": {"image": 1, "test": rates}, "ant": {"image": 1}, "cow": {"image": 1}}
    events = [
        *EVENTS[:6],
        {"event": "decisions", "step": 0, "objects": {name: dict(record[name]) for name in ("bee", "ant")}},
        *EVENTS[7:13],
        {"event": "decisions", "step": 1, "objects": {name: {"image": 2} for name in record}},
        EVENTS[14],
        {"event": "step", "step": 2, "act": "update", "objects": ["cow"], "images": 3},
        {"event": "before", "step": 2, "object": "cow", "i_auroc": 0.8, **rates},
        evaluation(2, "cow", "net", 0.9),
        evaluation(2, "cow", "baseline", 0.3),
        {"event": "decisions", "step": 2, "objects": {name: {"image": 3} for name in record}},
        snapshot(2, 200),
        {"event": "step", "step": 3, "act": "retire", "objects": ["ant"], "images": 0},
        {"event": "decisions", "step": 3, "objects": {name: {"image": 3} for name in record}},
        snapshot(3, 200),
    ]
    past = history(events)
    assert past.steps == (("bee", "ant"), ("cow",), (), ())
    np.testing.assert_array_equal(past.matrices["net"]["aupro"][1:, 0], [0.7, 0.7, 0.7])
    np.testing.assert_array_equal(past.matrices["net"]["aupro"][1:, 2], [0.8, 0.9, 0.9])
    assert past.tested == {"bee": 1, "ant": 0}  # the maps of cow have not changed since its test
    assert past.acts[2] == {"act": "update", "objects": ["cow"], "before": {"cow": {"i_auroc": 0.8, **rates}}}
    assert past.decisions[3]["objects"]["bee"] == {"image": 3, "test": rates}
    matrix = past.matrices["net"]["i_auroc"]
    lines = [in_one_line(matrix, past.acts, past.decisions, step) for step in (2, 3)]
    assert lines == [
        "step 2: updated cow 0.800 to 0.900 (false alarms 20.0% to -, misses 0.0% to -); largest change of another"
        " object: bee +0.000; mean of all 0.800 (I-AUROC)",
        "step 3: retired ant; mean of all 0.800 (I-AUROC)",
    ]


def test_without_test_images_a_step_tells_the_threshold():
    """Ant has no test images; its threshold is 0.5, and 0.75 after an update."""

    def deciding(step, threshold):
        return {"event": "decisions", "step": step, "objects": {"ant": {"image": {"threshold": threshold}}}}

    events = [
        {"event": "step", "step": 0, "act": "learn", "objects": ["ant"], "images": 5},
        deciding(0, 0.5),
        snapshot(0, 100),
        {"event": "step", "step": 1, "act": "update", "objects": ["ant"], "images": 5},
        deciding(1, 0.75),
        snapshot(1, 100),
    ]
    past = history(events)
    matrix = past.matrices["net"]["i_auroc"]
    lines = [in_one_line(matrix, past.acts, past.decisions, step) for step in (0, 1)]
    assert lines == ["step 0: learned ant (threshold 0.500)", "step 1: updated ant (threshold 0.500 to 0.750)"]
