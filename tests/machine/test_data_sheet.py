import pytest

from gpt.machine.data_sheet import find_data_sheet_peak


@pytest.mark.parametrize(
    ("name", "dtype", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", "bfloat16", 989.4),
        ("NVIDIA H100 PCIe", "bfloat16", 756),
        ("NVIDIA H100 NVL", "float16", 835),
        ("NVIDIA H200", "float32", 494.7),
        ("NVIDIA A100-SXM4-80GB", "bfloat16", 312),
        ("NVIDIA A100-PCIE-40GB", "float32", 156),
        ("NVIDIA A10", "bfloat16", 125),
        ("NVIDIA A10G", "bfloat16", 70),
        ("NVIDIA L4", "bfloat16", 121),
        ("NVIDIA L40S", "bfloat16", 362),
        ("Tesla T4", "float16", 65),
        ("Tesla V100-SXM2-16GB", "float16", 125),
        ("NVIDIA GeForce RTX 4090", "bfloat16", 165.2),
    ],
)
def test_peak_is_that_of_the_named_card_and_dtype(name: str, dtype: str, tflops: float) -> None:
    assert find_data_sheet_peak(name, dtype) == pytest.approx(tflops * 1e12)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("Intel(R) Xeon(R) Processor, 2 threads", "bfloat16"),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "bfloat16"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "bfloat16"),
        ("NVIDIA GeForce RTX 4090 D", "bfloat16"),
        ("NVIDIA T400", "float16"),
        ("Tesla T4", "bfloat16"),
    ],
)
def test_unknown_cards_slices_and_dtypes_have_no_peak(name: str, dtype: str) -> None:
    assert find_data_sheet_peak(name, dtype) is None
