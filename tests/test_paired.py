"""What bad answers added, item by item, beyond the control of each method."""

import numpy as np

from grasp.study.paired import paired


def test_pairs_of_several_seeds_are_pooled_by_item():
    shifts = {"plain": [3.0, 5.0], "benign": [1.0, 1.0], "grasp": [1.5, 1.5]}
    runs = [
        {
            "task": "t",
            "method": m,
            "seed": seed,
            "items": {"task": np.add(shifts.get(m, [1.0, 1.0]), seed)},
        }
        for m in ("plain", "benign", "grasp", "benign_guarded")
        for seed in (0, 1)
    ]
    found = {p["seed"]: p for p in paired([*runs, {**runs[0], "seed": 2}])}
    assert list(found) == [0, 1, "all"]  # seed 2 is not whole
    assert found["all"]["plain_beyond_benign"][0] == 3.0
    assert found["all"]["difference"][0] == 0.5 - 3.0
    alone = paired([r for r in runs if "benign" not in r["method"]])
    found = {p["seed"]: p for p in alone}
    assert found["all"]["control"] == "base"
    assert found["all"]["difference"] == found["all"]["less_plain"]
    assert found["all"]["plain_beyond_benign"][0] == 4.5  # the shift itself: 4, and the seed's mean


def test_grasp_is_set_against_each_rival_beyond_the_control_of_either():
    shifts = {"plain": 5.0, "benign": 1.0, "grasp": 2.0, "benign_guarded": 1.5}
    shifts |= {"kl=1": 4.0, "benign_kl=1": 3.0, "random": 5.0}
    runs = [
        {"task": "t", "method": m, "seed": seed, "items": {"task": [v - seed, v + seed]}}
        for m, v in shifts.items()
        for seed in (0, 1)
    ]
    found = {p["method"]: p for p in paired(runs)}  # "all" comes last
    assert found["kl=1"]["grasp_difference"][0] == (2.0 - 1.5) - (4.0 - 3.0)
    assert found["kl=1"]["grasp_less"][0] == 2.0 - 4.0
    assert found["random"]["grasp_difference"][0] == (2.0 - 1.5) - (5.0 - 1.0)
    assert "grasp_difference" not in found["grasp"]
    less = paired([r for r in runs if (r["method"], r["seed"]) != ("grasp", 1)])
    assert [p["seed"] for p in less if p["method"] == "kl=1"] == [0, 1, "all"]
    assert not any("grasp_difference" in p for p in less)  # not of the same seeds
