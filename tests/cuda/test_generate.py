"""Generation on a CUDA device, without a GPU: one host sync for the next token of all texts."""

from typing import Any

import pytest

from tests.cuda.device import FakeCudaProcess


@pytest.mark.parametrize("end", [2, 7], ids=["equal lengths", "lengths that differ"])
@pytest.mark.parametrize(
    "settings", [{"temperature": 0}, {"top_k": 5, "top_p": 0.9, "min_p": 0.1}], ids=["greedy", "filters"]
)
def test_token_of_all_texts_takes_one_host_sync(settings: dict[str, Any], end: int, fake_cuda: FakeCudaProcess) -> None:
    record = fake_cuda.run("generate_token", settings=settings, end=end)
    assert record["syncs"] == ["tolist"]
    assert record["mixed"] == []
