"""A stand-in for a vLLM server where vLLM is not installed: the requests that notebook E9a makes, answered by the transformers engine.

    python tests/stand_in_server.py [MODEL] [HOST]      prints its address, then serves until its standard input ends

Weights come over gloo, received by the code that vLLM's workers run. Requests that wait together are answered as one batch.
"""
import contextlib
import io
import itertools
import json
import os
import sys
import threading
from concurrent.futures import Future
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from queue import Queue
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).parent.parent))

from cs336_alignment.inference import Request, SamplingParams, TransformersEngine
from cs336_alignment.models import load_policy
from cs336_alignment.vllm_server import gloo_group, receive_over_gloo

MODEL, HOST = [*sys.argv[1:], *["micro", "127.0.0.1"][len(sys.argv) - 1:]]
with contextlib.redirect_stdout(io.StringIO()):
    ENGINE = TransformersEngine(*load_policy(MODEL, device="cpu"))
WAITING: Queue = Queue()
GROUP: list = []
PATHS = {"/version": {"version": "0.26.0"}, "/v1/models": {"data": [{"id": MODEL}]}, "/get_world_size": {"world_size": 1},
         "/server_info": {"vllm_config": {"weight_transfer_config": {"backend": "gloo"}, "model_config": {
             "max_model_len": ENGINE.context, "dtype": "torch.float32", "logprobs_mode": "processed_logprobs"}}}}


def complete(body: dict) -> dict:
    done: Future = Future()
    same = {k: body[k] for k in ("temperature", "top_p", "max_tokens", "min_tokens", "stop", "include_stop_str_in_output", "ignore_eos")}
    WAITING.put((Request(body["prompt"], body["seed"], body["max_tokens"]), SamplingParams(**same), done))
    text, ids, logprobs, reason = done.result()
    return {"choices": [{"text": text, "token_ids": ids, "logprobs": {"token_logprobs": logprobs}, "finish_reason": reason}]}


def answer(path: str, body: dict) -> dict:
    if path == "/v1/completions":
        return complete(body)
    if path == "/tokenize":
        return {"tokens": ENGINE.tokenizer(body["prompt"], add_special_tokens=False).input_ids}
    if path == "/init_weight_transfer_engine":
        info = body["init_info"]
        GROUP[:] = [gloo_group(info["master_address"], info["master_port"], info["rank_offset"], info["world_size"])]
    if path == "/update_weights":
        ENGINE.load_weights(receive_over_gloo(GROUP[0], SimpleNamespace(**body["update_info"])))
    return PATHS.get(path, {})


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        body = json.loads(self.rfile.read(int(self.headers.get("Content-Length") or 0)) or "{}")
        reply = json.dumps(answer(self.path.partition("?")[0], body)).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(reply)))
        self.end_headers()
        self.wfile.write(reply)

    do_POST = do_GET

    def log_message(self, *args):
        pass


class Server(ThreadingHTTPServer):
    request_queue_size, daemon_threads = 1024, True


if __name__ == "__main__":
    server = Server((HOST, 0), Handler)
    print(f"serving on http://{HOST}:{server.server_port}", flush=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    threading.Thread(target=lambda: sys.stdin.read() or os._exit(0), daemon=True).start()  # with who started it
    while True:
        waiting = [WAITING.get()]
        while not WAITING.empty():
            waiting.append(WAITING.get())
        for sampling, some in itertools.groupby(waiting, key=lambda one: one[1]):
            some = list(some)
            for (*_, done), row in zip(some, ENGINE._run([request for request, *_ in some], sampling, None)):
                done.set_result(row)
