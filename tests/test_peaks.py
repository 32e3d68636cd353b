"""What devices can do at most."""

from types import SimpleNamespace

import jax
import pytest

from jaxformer.run import peaks


def device(kind, platform="gpu", **stats):
    return SimpleNamespace(device_kind=kind, platform=platform, memory_stats=lambda: stats or None)


@pytest.mark.parametrize(
    ("kind", "dtype", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", "bfloat16", 312e12),
        ("A100-SXM4-40GB", "float32", 156e12),
        ("NVIDIA H100 80GB HBM3", "float16", 989e12),
        ("NVIDIA H200", "bfloat16", 989e12),
        ("NVIDIA L4", "bfloat16", 121e12),
        ("Tesla T4", "float32", 8.1e12),
        ("Tesla T4", "bfloat16", None),  # which it has no unit for
        ("TPU v4", "bfloat16", 275e12),
        ("TPU v5 lite", "bfloat16", 197e12),
        ("TPU v5", "float32", 459e12),
        ("TPU v6 lite", "bfloat16", 918e12),
        ("NVIDIA H100 PCIe", "bfloat16", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "bfloat16", None),  # a seventh of one
        ("NVIDIA L40S", "bfloat16", None),
        ("TPU v4 lite", "bfloat16", None),
    ],
)
def test_peaks_are_known_by_name_or_not_at_all(kind, dtype, peak):
    assert peaks.peak_flops([device(kind)], dtype) == peak
    assert peaks.peak_flops([device(kind)] * 8, dtype) == (peak and 8 * peak)


def test_the_peak_of_a_cpu_is_the_best_that_was_measured(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXFORMER_CACHE", str(tmp_path))
    peaks._measured.cache_clear()
    found = peaks.peak_flops(jax.devices("cpu"), "float32")
    assert found > 1e8 and peaks.peak_flops([device("cpu", "cpu")] * 8, "float32") == found
    (kept,) = (tmp_path / "peaks").iterdir()
    assert float(kept.read_text()) == found
    for text, best in (("1e30", 1e30), ("3.0", None), ("torn", None)):
        kept.write_text(text)
        peaks._measured.cache_clear()
        now = peaks.peak_flops(jax.devices("cpu"), "float32")
        assert now == best or (best is None and 1e8 < now < 1e20)
    monkeypatch.setenv("JAXFORMER_CACHE", str(kept))  # which is no folder
    peaks._measured.cache_clear()
    assert 1e8 < peaks.peak_flops(jax.devices("cpu"), "float32") < 1e20
    peaks._measured.cache_clear()


def test_peak_memory_is_that_of_the_fullest_device():
    full, empty = device("x", peak_bytes_in_use=7, bytes_in_use=5), device("x", peak_bytes_in_use=3)
    assert peaks.peak_memory([empty, full]) == 7
    assert peaks.peak_memory([device("x"), device("x", bytes_in_use=5)]) is None
