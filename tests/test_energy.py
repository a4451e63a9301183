"""Energy from counters that tests turn themselves: wrap-around, several packages, none, and a GPU's."""

from __future__ import annotations

import sys
import types

import pytest

from causal_compress.deploy.energy import counters, energy_per_call


def zone(powercap, name, start_uj=0, range_uj=1_000_000):
    folder = powercap / name
    folder.mkdir(parents=True)
    (folder / "energy_uj").write_text(f"{start_uj}\n")
    (folder / "max_energy_range_uj").write_text(f"{range_uj}\n")
    return folder / "energy_uj"


def turn(path, microjoules, range_uj=1_000_000):
    path.write_text(str((int(path.read_text()) + microjoules) % range_uj))


def test_packages_are_summed_and_cores_inside_them_are_not(tmp_path):
    first, second = zone(tmp_path, "intel-rapl:0"), zone(tmp_path, "intel-rapl:1")
    core = zone(tmp_path, "intel-rapl:0:0")

    def call():
        turn(first, 30)
        turn(second, 12)
        turn(core, 500)

    found = counters(gpu=False, powercap=tmp_path)
    assert len(found) == 2
    assert energy_per_call(call, found, seconds=0.01) == pytest.approx(42e-6)


def test_a_counter_that_begins_anew_is_followed(tmp_path):
    path = zone(tmp_path, "intel-rapl:0", start_uj=999_990)
    assert energy_per_call(lambda: turn(path, 5), counters(gpu=False, powercap=tmp_path), seconds=0.001) == (
        pytest.approx(5e-6)
    )


@pytest.mark.parametrize("content", ["", "much"])
def test_what_cannot_be_read_is_no_counter(tmp_path, content):
    zone(tmp_path, "intel-rapl:0").write_text(content)
    assert counters(gpu=False, powercap=tmp_path) == ()
    assert counters(gpu=False, powercap=tmp_path / "absent") == ()
    assert energy_per_call(lambda: None, ()) is None


def test_a_counter_that_stands_still_tells_nothing(tmp_path):
    zone(tmp_path, "intel-rapl:0")
    assert energy_per_call(lambda: None, counters(gpu=False, powercap=tmp_path), seconds=0.001) is None


def test_a_gpu_has_its_own_counter(monkeypatch):
    spent = {"mj": 7}
    fake = types.ModuleType("pynvml")
    fake.nvmlInit = lambda: None
    fake.nvmlDeviceGetHandleByIndex = lambda index: f"gpu {index}"
    fake.nvmlDeviceGetTotalEnergyConsumption = lambda device: spent["mj"] if device == "gpu 0" else 0
    monkeypatch.setitem(sys.modules, "pynvml", fake)

    def call():
        spent["mj"] += 3

    assert energy_per_call(call, counters(gpu=True), seconds=0.001) == pytest.approx(3e-3)
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert counters(gpu=True) == ()
