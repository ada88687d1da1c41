"""NVML as it is called in earnest: the real pynvml, over a library that tells what we like."""

from __future__ import annotations

import pytest


def test_the_free_memory_of_all_gpus_is_summed(start_child) -> None:
    answer = start_child("nvml_child.py", "two").ask()
    assert (answer["available_gib"], answer["total_gib"], answer["count"]) == (41, 48, 2)
    assert answer["names"] == ["Fake GPU 0", "Fake GPU 1"]


def test_one_healthy_gpu(start_child) -> None:
    child = start_child("nvml_child.py", "healthy")
    assert child.ask()["available_gib"] == 20
    assert child.ask()["available_gib"] == 20
    assert child.close() == 0


def test_with_mig_on_the_instances_are_summed_and_counted(start_child) -> None:
    answer = start_child("nvml_child.py", "mig").ask()
    assert (answer["available_gib"], answer["total_gib"], answer["count"]) == (4, 20, 2)
    assert answer["indices"] == ["0:0", "0:2"]


def test_mig_without_an_instance_offers_nothing_and_says_what_to_do(start_child) -> None:
    answer = start_child("nvml_child.py", "mig_empty").ask()
    assert answer["code"] == "no_mig_instance"
    assert "nvidia-smi mig" in str(answer["message"])


@pytest.mark.parametrize("scenario", ["not_supported", "zero_total"])
def test_a_gpu_without_memory_of_its_own_offers_the_systems(start_child, scenario: str) -> None:
    answer = start_child("nvml_child.py", scenario).ask()
    assert (answer["available_gib"], answer["total_gib"], answer["count"]) == (100, 128, 1)


def test_the_systems_memory_counts_once_however_many_gpus_share_it(start_child) -> None:
    answer = start_child("nvml_child.py", "two_unified").ask()
    assert (answer["available_gib"], answer["total_gib"], answer["count"]) == (100, 128, 2)


def test_a_lost_gpu_is_read_again_once_it_is_back(start_child) -> None:
    child = start_child("nvml_child.py", "healthy")
    assert child.ask()["available_gib"] == 20
    child.set_scenario("lost")
    assert child.ask()["code"] == "gpu_is_lost"
    assert child.ask()["code"] == "gpu_is_lost"
    child.set_scenario("healthy")
    assert child.ask()["available_gib"] == 20


def test_one_lost_gpu_does_not_hide_the_memory_of_the_others(start_child) -> None:
    answer = start_child("nvml_child.py", "one_of_two_lost").ask()
    assert (answer["available_gib"], answer["count"]) == (20, 1)
    assert answer["codes"] == ["gpu_is_lost"]


def test_a_gpu_that_the_container_may_not_open_is_left_out(start_child) -> None:
    answer = start_child("nvml_child.py", "one_of_two_hidden").ask()
    assert (answer["available_gib"], answer["count"]) == (20, 1)


@pytest.mark.parametrize(
    ("scenario", "code"),
    [
        ("no_permission", "no_permission"),
        ("driver_not_loaded", "driver_not_loaded"),
        ("uninitialised", "uninitialized"),
        ("no_gpu", "no_device"),
        ("future_error", "nvml_4242"),
    ],
)
def test_a_driver_that_refuses_is_named_and_recovers(start_child, scenario: str, code: str) -> None:
    child = start_child("nvml_child.py", scenario)
    assert child.ask()["code"] == code
    child.set_scenario("healthy")
    assert child.ask()["available_gib"] == 20


def test_a_gpu_whose_name_is_no_text_is_still_read(start_child) -> None:
    answer = start_child("nvml_child.py", "bad_name").ask()
    assert answer["names"] == ["NVIDIA GPU 0"]


def test_the_table_of_gpus_says_what_to_do_about_a_hung_driver(start_child) -> None:
    child = start_child("nvml_child.py", "hanging")
    (row,) = child.ask("describe")["rows"]
    assert (row["source"], row["error"], row["announced"]) == ("nvml", "timeout", False)
    assert "nvidia-smi" in row["advice"]
    assert child.close() == 0  # the hung thread does not keep the process


def test_the_table_of_gpus_has_a_row_per_device(start_child) -> None:
    rows = start_child("nvml_child.py", "one_of_two_lost").ask("describe")["rows"]
    assert [(row["index"], row["announced"], row["error"]) for row in rows] == [
        ("0", True, None),
        ("1", False, "gpu_is_lost"),
    ]


def test_a_hung_driver_stalls_nothing_piles_up_nothing_and_may_return(start_child) -> None:
    child = start_child("monitor_child.py", "healthy")
    assert child.ask("known")["available"] == 20 * 1024**3

    child.set_scenario("hanging")
    lost = child.ask("unknown")
    assert lost["code"] == "timeout"
    hung = child.ask("rounds")
    assert hung["elapsed_s"] >= 1.0
    assert hung["worst_lag_s"] < 0.5  # generous: a stall would be as long as the hang
    assert hung["gpu_threads"] == 1
    assert 'gpu_read_errors_total{code="timeout"}' in hung["metrics"]
    assert "meshnode_available_vram_bytes NaN" in hung["metrics"]

    child.set_scenario("healthy")
    back = child.ask("known")
    assert back["available"] == 20 * 1024**3
    assert back["worst_lag_s"] < 0.5
    assert child.close() == 0


def test_a_node_ends_while_its_driver_hangs(start_child) -> None:
    child = start_child("monitor_child.py", "hanging")
    assert child.ask("unknown")["code"] == "timeout"
    assert child.close() == 0
