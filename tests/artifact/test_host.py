"""Whether an engine fits this machine, and why not."""

from exporter.artifact.host import check_host
from exporter.core.machine import cpu_features, triple


def test_this_machine_fits_itself_and_every_mismatch_has_a_remedy() -> None:
    assert check_host(triple(), {"cpu_features": sorted(cpu_features())[:3]}) == []
    found = check_host(triple(), {"cpu_features": ["x99"], "gpu": "sm_90"})
    assert [mismatch.what for mismatch in found] == ["cpu_features", "requirements"]
    assert "x99" in found[0].message and "gpu" in found[1].message
    assert [mismatch.what for mismatch in check_host("riscv64-linux", {})] == ["triple"]
    assert all(mismatch.message and mismatch.remedy for mismatch in found)
