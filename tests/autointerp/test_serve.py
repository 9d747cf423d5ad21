"""The tiny model behind a real `transformers serve`, asked through the official client."""

from __future__ import annotations

import importlib.util
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from sae_lens_multimodal.adapters.model import VisionLanguageModel
from sae_lens_multimodal.autointerp.explain import explain
from sae_lens_multimodal.autointerp.explanation import Explanation
from sae_lens_multimodal.autointerp.judges import JudgeReply, JudgeRequest, OpenAIJudge, Outcome, TransformersJudge
from sae_lens_multimodal.autointerp.measures import measure
from sae_lens_multimodal.autointerp.scorers.surprisal import SurprisalScorer
from sae_lens_multimodal.features.store import FeatureStore
from sae_lens_multimodal.scenes import make_scene, model_folder
from sae_lens_multimodal.scenes.prompt_book import scenes_prompt_book

MISSING = [name for name in ("fastapi", "uvicorn", "pydantic", "openai") if importlib.util.find_spec(name) is None]
START_SECONDS = 300

pytestmark = pytest.mark.skipif(
    bool(MISSING), reason=f"transformers[serving] is not installed: no {', '.join(MISSING)}"
)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Start the server on a free port; give its base URL."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("serve") / "log.txt"
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", str(model_folder())]
    options = ["--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "NO_PROXY": "127.0.0.1", "CUDA_VISIBLE_DEVICES": ""}
    with log.open("w") as output:
        process = subprocess.Popen([*command, *options], stdout=output, stderr=subprocess.STDOUT, env=environment)
        try:
            _wait(f"http://127.0.0.1:{port}/health", process, log)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(20)


def _wait(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end:
        assert process.poll() is None, log.read_text()[-3000:]
        try:
            with opener.open(url, timeout=5):
                return
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            time.sleep(0.25)
    raise AssertionError(f"no answer in {START_SECONDS} s: {log.read_text()[-3000:]}")


@pytest.fixture
def served(server: str, monkeypatch: pytest.MonkeyPatch) -> OpenAIJudge:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    return OpenAIJudge(str(model_folder()), base_url=server, concurrency=2, timeout_seconds=60.0)


def texts(outcomes: list[Outcome]) -> list[str | None]:
    return [one.text if isinstance(one, JudgeReply) else one.reply for one in outcomes]


def test_the_server_answers_as_the_model_in_this_process(served: OpenAIJudge, model: VisionLanguageModel) -> None:
    book = scenes_prompt_book()
    pictures = [make_scene(seed).image for seed in range(6)]
    crops = [picture.crop((0, 0, 40, 40)) for picture in pictures]
    requests: list[JudgeRequest | None] = [book.detect_image("red circle", picture) for picture in pictures]
    requests += [book.fuzz_image("blue", [crop]) for crop in crops]
    requests += [book.explain_images([[one], [two]], []) for one, two in zip(crops, pictures, strict=True)]
    requests.append(book.explain_texts(["a [ red ] circle .", "a [ red ] star ."], []))
    asked = [request for request in requests if request is not None]
    assert len(asked) == 19
    here = TransformersJudge(model).ask_all(asked, progress=False)
    there = served.ask_all(asked, progress=False)
    assert texts(there) == texts(here)
    assert len(set(texts(here))) > 2
    assert served.ledger.tokens_in > 0


def test_features_are_explained_through_the_server(
    served: OpenAIJudge, model: VisionLanguageModel, store: FeatureStore, tmp_path: Path
) -> None:
    book = scenes_prompt_book()
    there = explain(store, served, output=tmp_path / "there", prompts=book, n_examples=3, progress=False)
    here = explain(
        store, TransformersJudge(model), output=tmp_path / "here", prompts=book, n_examples=3, progress=False
    )
    assert [(one.feature, one.modality, one.text, one.shown) for one in there] == [
        (one.feature, one.modality, one.text, one.shown) for one in here
    ]
    assert len(there) == 5
    assert {one.judge for one in there} == {served.id}


def test_a_real_server_that_gives_no_log_probabilities_answers_and_surprisal_is_skipped(
    served: OpenAIJudge, model: VisionLanguageModel, store: FeatureStore, tmp_path: Path
) -> None:
    book = scenes_prompt_book()
    asked = book.detect_image("red circle", make_scene(0).image)
    assert asked is not None
    here = TransformersJudge(model).ask(asked)
    there = served.ask(replace(asked, top_log_probabilities=5))
    assert isinstance(there, JudgeReply)
    assert (there.text, there.log_probabilities) == (texts([here])[0], None)
    explained = [Explanation(feature=0, text="red"), Explanation(feature=1, text="green")]
    scorer = SurprisalScorer(served, book)
    found = measure(store, explained, [scorer], output=tmp_path / "out", progress=False)
    assert {one.found.note for one in found} == {"skipped: the judge gives no log-probabilities"}
    assert served.ledger.calls == 2
