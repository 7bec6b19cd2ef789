"""llama.cpp under the clock, for bench.rank: PEER_PYTHON bench/peer.py MODEL.gguf CONTEXT

Runs in an interpreter of its own that has llama-cpp-python and NumPy, and imports nothing of this project. It speaks JSON lines:

    out  {"version", "system", "weights_bytes", "load_s"}                                     once, when it is ready
    in   {"ids": [...], "tokens": n, "flash": true | false, "banned": [...]}
    out  {"token_ids": [...], "ttft_ms": x, "tpot_ms": [...]}                                 tpot_ms: per token after the first

One thread, greedy, by the C interface, so that no Python stands between two tokens but the choice of the likeliest.
"""

import ctypes
import json
import sys
import time

import llama_cpp
import numpy as np
from llama_cpp import llama_cpp as api

BATCH = 512  # tokens of a prompt that are computed at once


@api.llama_log_callback
def quiet(level, text, data):
    pass


class Peer:
    def __init__(self, path: str, context: int):
        begin = time.perf_counter()
        api.llama_log_set(quiet, ctypes.c_void_p(0))
        api.llama_backend_init()
        self._context = context
        self._model = api.llama_model_load_from_file(path.encode(), api.llama_model_default_params())
        if not self._model:
            sys.exit(f"peer: cannot load {path}")
        self._vocabulary = api.llama_vocab_n_tokens(api.llama_model_get_vocab(self._model))
        self._contexts = {flash: self._new_context(flash) for flash in (False, True)}
        self.load_s = time.perf_counter() - begin

    def _new_context(self, flash: bool):
        params = api.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = self._context, BATCH, BATCH
        params.n_threads = params.n_threads_batch = 1
        if hasattr(params, "flash_attn_type"):
            params.flash_attn_type = int(flash)  # 0: off, 1: on
        else:
            params.flash_attn = flash
        return api.llama_init_from_model(self._model, params)

    def facts(self) -> dict:
        return {
            "version": llama_cpp.__version__,
            "system": api.llama_print_system_info().decode().strip(),
            "weights_bytes": api.llama_model_size(self._model),
            "load_s": round(self.load_s, 3),
        }

    def complete(self, ids: list, tokens: int, flash: bool, banned: list) -> dict:
        context = self._contexts[flash]
        api.llama_memory_clear(api.llama_get_memory(context), True)
        times, made, last = [], [], ids
        while len(made) < tokens:
            begin = time.perf_counter()
            for start in range(0, len(last), BATCH):
                self._decode(context, last[start : start + BATCH])
            logits = np.ctypeslib.as_array(api.llama_get_logits_ith(context, -1), (self._vocabulary,))
            logits[banned] = -np.inf
            made.append(int(logits.argmax()))
            times.append(round((time.perf_counter() - begin) * 1e3, 3))
            last = made[-1:]
        return {"token_ids": made, "ttft_ms": times[0], "tpot_ms": times[1:]}

    def _decode(self, context, ids: list) -> None:
        tokens = (api.llama_token * len(ids))(*ids)  # the batch only points to them
        if code := api.llama_decode(context, api.llama_batch_get_one(tokens, len(ids))):
            sys.exit(f"peer: llama_decode returned {code}")


def main() -> None:
    peer = Peer(sys.argv[1], int(sys.argv[2]))
    print(json.dumps(peer.facts()), flush=True)
    for line in sys.stdin:
        print(json.dumps(peer.complete(**json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
