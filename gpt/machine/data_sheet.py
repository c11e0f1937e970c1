"""Peak FLOP/s of GPUs by their data sheets, for comparison with MFUs that others report.

Dense matmuls on tensor cores with float32 accumulation; data sheets often print twice as much, with sparsity. Sources:

    V100   "NVIDIA Tesla V100 GPU Accelerator" data sheet
    T4     "NVIDIA T4 Tensor Core GPU" data sheet
    A*     "NVIDIA A100/A30/A10/A10G/A40/RTX A6000" data sheets
    H*     "NVIDIA H100 Tensor Core GPU Architecture" white paper; "NVIDIA H100 NVL", "H200", "GH200" data sheets
    L*     "NVIDIA L4/L40/L40S" data sheets
    B200   "NVIDIA Blackwell" data sheet (HGX B200)
    30*    "NVIDIA Ampere GA102 GPU Architecture" white paper, appendix A
    40*    "NVIDIA Ada GPU Architecture" white paper, appendix A
    50*    "NVIDIA RTX Blackwell GPU Architecture" white paper, appendix A
"""

import re

_TFLOPS: dict[str, tuple[float, float]] = {
    "V100-SXM2": (125, 15.7),
    "V100-PCIE": (112, 14),
    "T4": (65, 8.1),
    "A10": (125, 62.5),
    "A10G": (70, 35),
    "A30": (165, 82),
    "A40": (149.7, 74.8),
    "RTX A6000": (154.8, 77.4),
    "A100-SXM4": (312, 156),
    "A100-PCIE": (312, 156),
    "A100 80GB PCIe": (312, 156),
    "H100 80GB HBM3": (989.4, 494.7),
    "H100 PCIe": (756, 378),
    "H100 NVL": (835, 417),
    "H200": (989.4, 494.7),
    "H200 NVL": (835, 417),
    "GH200": (989.4, 494.7),
    "L4": (121, 60),
    "L40": (181, 90.5),
    "L40S": (362, 183),
    "B200": (2250, 1125),
    "GeForce RTX 3090": (71, 35.6),
    "GeForce RTX 4090": (165.2, 82.6),
    "GeForce RTX 5090": (209.5, 104.8),
}
"""Part of the device's name -> TFLOP/s in bfloat16 and float16, and in float32, which is TF32 from the A series on."""
_WITHOUT_BFLOAT16 = frozenset({"V100-SXM2", "V100-PCIE", "T4"})
_OTHER_CARDS = re.compile(r"\b(MIG|Ti|SUPER|Laptop|Max-Q|D)\b")
"""Words in a name that make it another card, or a slice of one."""


def find_data_sheet_peak(device_name: str, dtype: str) -> float | None:
    """Return the peak FLOP/s of a GPU in its data sheet; None if it is not known.

    Args:
        device_name: as CUDA names it.
        dtype: float32, bfloat16 or float16.

    >>> find_data_sheet_peak("NVIDIA H100 80GB HBM3", "bfloat16")
    989400000000000.0
    >>> find_data_sheet_peak("NVIDIA A10G", "float32"), find_data_sheet_peak("Tesla T4", "bfloat16")
    (35000000000000.0, None)
    """
    cards = [card for card in _TFLOPS if re.search(rf"(?<!\w){re.escape(card)}(?!\w)", device_name)]
    if not cards or _OTHER_CARDS.search(device_name):
        return None
    card = max(cards, key=len)
    if dtype == "bfloat16" and card in _WITHOUT_BFLOAT16:
        return None
    half, single = _TFLOPS[card]
    return 1e12 * (single if dtype == "float32" else half)
