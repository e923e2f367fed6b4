"""The energy meter: which files count, and counters that start again."""

from edgewright.measure import energy


def rail(folder, name, microjoules, most=1000):
    folder.mkdir()
    (folder / "name").write_text(f"{name}\n")
    (folder / "energy_uj").write_text(f"{microjoules}\n")
    (folder / "max_energy_range_uj").write_text(f"{most}\n")


def test_packages_count_and_their_parts_do_not(tmp_path):
    rail(tmp_path / "intel-rapl:0", "package-0", 10)
    rail(tmp_path / "intel-rapl:0:0", "core", 5)
    rail(tmp_path / "intel-rapl:1", "package-1", 20)
    found = energy.rails(tmp_path)
    assert sorted(found) == ["package-0", "package-1"]
    assert energy.reading(found) == {"package-0": 10, "package-1": 20}


def test_a_counter_that_starts_again(tmp_path):
    rail(tmp_path / "intel-rapl:0", "package-0", 0)
    found = energy.rails(tmp_path)
    assert energy.joules({"package-0": 900}, {"package-0": 100}, found) == 200e-6
    assert energy.joules({"package-0": 100}, {"package-0": 900}, found) == 800e-6


def test_no_meter_is_no_figure(tmp_path):
    joules, reason = energy.energy(None, tmp_path)
    assert joules is None
    assert "no energy meter" in reason
