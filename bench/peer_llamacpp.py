"""Server for `bench.peers`: decoding and prefill of a GGUF file by llama.cpp, through llama-cpp-python.

Arguments: MODEL.gguf THREADS. Requests: {"do": "version"}, {"do": "logits", "tokens": [...]},
{"do": "decode", "prompt": 8, "tokens": 64} and {"do": "prefill", "tokens": 256}.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

import llama_cpp
import numpy as np

WINDOW = 512


class Server:
    """One model in one context."""

    def __init__(self, path: str, threads: int) -> None:
        self.silent = llama_cpp.llama_log_callback(lambda *_: None)  # kept: llama.cpp holds no reference
        llama_cpp.llama_log_set(self.silent, None)
        llama_cpp.llama_backend_init()
        parameters = llama_cpp.llama_model_default_params()
        self.model = llama_cpp.llama_model_load_from_file(path.encode(), parameters)
        if not self.model:
            raise SystemExit(f"llama.cpp cannot load {path}")
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx = settings.n_batch = settings.n_ubatch = WINDOW
        settings.n_threads = settings.n_threads_batch = threads
        self.context = llama_cpp.llama_init_from_model(self.model, settings)
        self.vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))

    def clear(self) -> None:
        """Forget all tokens."""
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.context), True)

    def run(self, tokens: list[int]) -> np.ndarray:
        """Append tokens; returns the last one's logits."""
        array = (llama_cpp.llama_token * len(tokens))(*tokens)
        if llama_cpp.llama_decode(self.context, llama_cpp.llama_batch_get_one(array, len(tokens))) != 0:
            raise RuntimeError("llama_decode failed")
        return np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(self.context, -1), (self.vocabulary,))

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """One request."""
        self.clear()
        if request["do"] == "version":
            return {"version": f"llama-cpp-python {llama_cpp.__version__}"}
        if request["do"] == "logits":
            return {"logits": [float(v) for v in self.run(request["tokens"])]}
        tokens = np.random.default_rng(0).integers(0, self.vocabulary, request["tokens"]).tolist()
        if request["do"] == "prefill":
            started = time.perf_counter()
            self.run(tokens)
            return {"tokens_s": len(tokens) / (time.perf_counter() - started)}
        following = int(self.run(tokens[: request["prompt"]]).argmax())
        following = int(self.run([following]).argmax())
        started = time.perf_counter()
        for _ in range(request["tokens"]):
            following = int(self.run([following]).argmax())
        return {"tokens_s": request["tokens"] / (time.perf_counter() - started)}


def main() -> None:
    """Answer until the input ends. What llama.cpp prints goes to the standard error."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    server = Server(sys.argv[1], int(sys.argv[2]))
    for line in sys.stdin:
        print(json.dumps(server.answer(json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    main()
