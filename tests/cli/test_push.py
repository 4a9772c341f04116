"""`--push_to_hub` against a local copy of the hub's HTTP interface: what is there in the end."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import huggingface_hub.hf_api
import pytest
from huggingface_hub import ModelCard

from lopt.cli.main import main


class Hub(BaseHTTPRequestHandler):
    """One repository; every file comes in the commit itself."""

    commits: list[dict[str, bytes]]
    protocol_version = "HTTP/1.1"

    def _answer(self, content: Any) -> None:
        body = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        self._answer({"name": "me", "type": "user", "sha": "0" * 40, "id": "me/sums", "siblings": []})

    def do_POST(self) -> None:
        length = self.headers.get("Content-Length")
        sent = self.rfile.read(int(length)) if length else b"".join(self._chunks())
        if self.path.endswith("/repos/create"):
            self._answer({"url": f"{huggingface_hub.constants.ENDPOINT}/me/sums"})
        elif "/preupload/" in self.path:
            files = [{"path": f["path"], "uploadMode": "regular"} for f in json.loads(sent)["files"]]
            self._answer({"files": [file | {"shouldIgnore": False, "oid": None} for file in files]})
        elif "/commit/" in self.path:
            lines = [json.loads(line) for line in sent.splitlines() if line.strip()]
            files = {
                v["path"]: base64.b64decode(v["content"]) for v in (x["value"] for x in lines) if "path" in v
            }
            self.commits.append(files)
            here = f"{huggingface_hub.constants.ENDPOINT}/me/sums/commit/{'1' * 40}"
            self._answer({"commitOid": "1" * 40, "commitUrl": here, "success": True})
        else:
            self._answer({"errors": [], "warnings": []})  # the metadata of a card is looked at

    def _chunks(self) -> Iterator[bytes]:
        while size := int(self.rfile.readline().strip() or b"0", 16):
            yield self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()

    def log_message(self, *_: Any) -> None:
        pass


def test_the_hub_has_the_last_evaluation_and_the_page(
    tiny_folder: Path, sums_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    Hub.commits = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    place = f"http://127.0.0.1:{server.server_address[1]}"
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", place)
    monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", place)  # the module's own, made before
    folder = tmp_path / "sums"
    words = f"sft --model_name_or_path {tiny_folder} --train_file {sums_file} --output_dir {folder} "
    words += (
        "--max_steps 2 --head_warmup_steps 1 --held_out 8 --push_to_hub --hub_model_id me/sums --hub_token x"
    )
    try:
        assert main(words.split()) == 0
    finally:
        server.shutdown()
    commit = Hub.commits[-1]  # those before are of checkpoints
    for name in ("README.md", "report.html", "model.safetensors", "eval_results.json"):
        assert commit[name] == (folder / name).read_bytes(), name
    card = ModelCard(commit["README.md"].decode())
    held_out = json.loads(commit["eval_results.json"])["eval_loss"]
    assert [r.metric_value for r in card.data.eval_results] == [pytest.approx(held_out, abs=1e-6)]
    assert "me/sums" in card.text and not [name for name in commit if name.startswith("checkpoint-")]
    assert f"The model is on the hub: {place}/me/sums" in capsys.readouterr().out
