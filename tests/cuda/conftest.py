"""The fixture of the process with the CUDA device."""

import shutil
from collections.abc import Iterator

import pytest

from tests.cuda.device import FakeCudaProcess, compile_device


@pytest.fixture(scope="session")
def fake_cuda(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FakeCudaProcess]:
    """Return the process; without a compiler the test is skipped."""
    if shutil.which("c++") is None:
        pytest.skip("the CUDA device of these tests needs a C++ compiler")
    with FakeCudaProcess(compile_device(tmp_path_factory.mktemp("device"))) as process:
        yield process
