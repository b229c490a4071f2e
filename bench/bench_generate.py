"""Decode and prefill of a random Llama-3.2-1B-shaped GPTQ checkpoint through plain Transformers, beside llama.cpp.

    python -m bench.bench_generate FOLDER [--bits 4] [--head-bits 8] [--modes exact,int8] [--new-tokens 64]
        [--prompt 256] [--dtype bfloat16] [--llama-python PYTHON] [--dense] [--compiled] [--layers 16] [--repeats 5]
        [--no-append]

FOLDER keeps the checkpoint and its GGUF file, both made when they are missing. llama.cpp runs the file that our
exporter wrote, with the same codes (Q4_0, the head Q8_0 or Q4_0); PYTHON is an interpreter whose environment has
llama-cpp-python. Its logits, and those of Transformers' own linears (--dense), are compared with ours before
anything is timed. Decoding is timed from the second token on. Where a token's time goes: inside the native calls,
against the bytes that they read at the probe's speed; and without any linear (each replaced by an empty tensor), which
is what Python and torch cost while nothing drives them out of the caches. Appends to bench/results/generate.jsonl.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CompileConfig

import lightgptq
from bench.bench_cpu_matmul import Probe, quantiles
from bench.peers import Peer, PeerError
from bench.random_llama import write_random_quantized_llama
from bench.record import append
from lightgptq.checkpoint.gguf import export_gguf
from lightgptq.decoding.mlp import GatedMLP, forget_call
from lightgptq.linear import QuantLinear
from lightgptq.ops import cpu

PROMPT = 8  # tokens before those that are decoded
DENSE_TOKENS = 12  # Transformers' own linears take a fifth of a second each
SETTLE = 0.05  # seconds in which the threads of whoever ran before stop spinning


@dataclass
class Candidate:
    """Somebody who generates: tokens a second of decoding and of prefill."""

    decode: Callable[[int], float]
    prefill: Callable[[int], float]
    most_tokens: int = 1 << 30


class Stub(nn.Module):
    """No arithmetic at all: allocates the output."""

    def __init__(self, out_features: int) -> None:
        super().__init__()
        self.out_features = out_features

    def forward(self, x: Tensor) -> Tensor:
        """Zeros of the output's shape."""
        return x.new_zeros((*x.shape[:-1], self.out_features))


def quant_linears(model: nn.Module) -> list[tuple[nn.Module, str, QuantLinear]]:
    """Every quantized linear with its parent and name."""
    return [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if isinstance(child, QuantLinear)
    ]


def replaced(model: nn.Module, other: Callable[[QuantLinear], nn.Module]) -> Callable[[], None]:
    """Put another module in the place of each quantized linear; returns what undoes it."""
    kept = quant_linears(model)
    for parent, name, child in kept:
        setattr(parent, name, other(child))

    def undo() -> None:
        for parent, name, child in kept:
            setattr(parent, name, child)

    return undo


def dense(layer: QuantLinear, dtype: torch.dtype) -> nn.Linear:
    """The same weight, dequantized."""
    linear = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
    linear.weight = nn.Parameter(layer.dequantize(dtype), requires_grad=False)
    return linear


def decode(model: Any, new_tokens: int) -> float:
    """Tokens a second after the first one, in one ``generate`` call."""
    prompt = torch.randint(0, model.config.vocab_size, (1, PROMPT))
    moments: list[float] = []

    class Clock:
        def put(self, value: Tensor) -> None:
            moments.append(time.perf_counter())

        def end(self) -> None:
            pass

    model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        do_sample=False,
        max_new_tokens=new_tokens + 1,
        streamer=Clock(),
        pad_token_id=0,
    )
    return (len(moments) - 2) / (moments[-1] - moments[1])


@torch.no_grad()
def prefill(model: Any, tokens: int) -> float:
    """Tokens a second of one forward pass that keeps only the last logits, as ``generate`` does."""
    prompt = torch.randint(0, model.config.vocab_size, (1, tokens))
    started = time.perf_counter()
    model(prompt, use_cache=True, logits_to_keep=1)
    return tokens / (time.perf_counter() - started)


def set_mode(model: nn.Module, mode: str) -> None:
    """Switch every quantized linear."""
    for _, _, layer in quant_linears(model):
        layer.mode = mode


def compile_decoding(model: Any, wanted: bool) -> None:
    """Let ``generate`` compile the forward pass, which needs a cache of fixed size; or no longer."""
    model.generation_config.cache_implementation = "static" if wanted else None
    model.generation_config.compile_config = CompileConfig(fullgraph=True, mode="default") if wanted else None
    if wanted:
        model.generation_config.compile_config._compile_all_devices = True  # Transformers leaves CPUs out


def ours(model: Any, mode: str, compiled: bool = False) -> Candidate:
    """Our linears in one of their arithmetics."""

    def prepared(measure: Callable[[Any, int], float]) -> Callable[[int], float]:
        def run(tokens: int) -> float:
            set_mode(model, mode)
            compile_decoding(model, compiled)
            return measure(model, tokens)

        return run

    return Candidate(prepared(decode), prepared(prefill))


def transformers_dense(model: Any, logits: Tensor, tokens: Tensor) -> Candidate:
    """Transformers with the dequantized weights; everything but the linears is shared with ``model``."""
    made = {id(layer): dense(layer, model.dtype) for _, _, layer in quant_linears(model)}

    def swapped(measure: Callable[[Any, int], Any]) -> Callable[[int], Any]:
        def run(count: int) -> Any:
            compile_decoding(model, False)
            undo = replaced(model, lambda layer: made[id(layer)])
            try:
                return measure(model, count)
            finally:
                undo()

        return run

    check("Transformers", logits, swapped(lambda m, _: last_logits(m, tokens))(0))
    return Candidate(swapped(decode), swapped(prefill), DENSE_TOKENS)


@torch.no_grad()
def last_logits(model: Any, tokens: Tensor) -> Tensor:
    """Logits after a prompt, float32."""
    return model(tokens[None]).logits[0, -1].float()


def linears(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Linear]]:
    """Every nn.Linear with its parent and name."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear):
                yield parent, name, child


def llama_cpp(peer: Peer, logits: Tensor, tokens: list[int]) -> tuple[Candidate, str]:
    """llama.cpp, once its logits agree with ours, and its version; raises PeerError."""
    theirs = torch.tensor(peer.ask(do="logits", tokens=tokens)["logits"])
    check("llama.cpp", logits, theirs)
    candidate = Candidate(
        lambda n: float(peer.ask(do="decode", prompt=PROMPT, tokens=n)["tokens_s"]),
        lambda n: float(peer.ask(do="prefill", tokens=n)["tokens_s"]),
    )
    return candidate, str(peer.ask(do="version")["version"])


def check(name: str, logits: Tensor, theirs: Tensor) -> None:
    """Raise SystemExit unless two vectors of logits are nearly parallel; activations in 8 bits turn them by 0.1."""
    cosine = float(torch.nn.functional.cosine_similarity(logits.double(), theirs.double(), dim=0))
    if cosine < 0.98:
        raise SystemExit(
            f"{name} computes other logits than lightgptq: cosine {cosine:.4f}, at least 0.98 expected"
        )


def forget_calls(model: nn.Module) -> None:
    """Calls for several linears are made anew, with or without the clock."""
    for module in model.modules():
        if isinstance(module, QuantLinear):
            module.place = None
        if isinstance(module, GatedMLP):
            forget_call(module)


def breakdown(model: Any, mode: str, new_tokens: int, bandwidth: Callable[[], float]) -> dict[str, float]:
    """Where the milliseconds of a token go, eagerly."""
    set_mode(model, mode)
    compile_decoding(model, False)
    spent = [0.0, 0]

    def timed(function: Callable[..., int]) -> Callable[..., int]:
        def call(*arguments: Any) -> int:
            started = time.perf_counter()
            status = function(*arguments)
            spent[0] += time.perf_counter() - started
            spent[1] += 1
            return status

        return call

    single, several = cpu._matmul_function, (cpu.SharedProduct, cpu.GatedProduct)
    inits: list[Any] = [cls.__init__ for cls in several]

    def with_clock(init: Any) -> Callable[..., None]:
        def init_with_clock(self: Any, *arguments: Any) -> None:
            init(self, *arguments)
            self._function = timed(self._function)

        return init_with_clock

    setattr(cpu, "_matmul_function", lambda: timed(single()))  # noqa: B010
    for cls, init in zip(several, inits, strict=True):
        setattr(cls, "__init__", with_clock(init))  # noqa: B010
    forget_calls(model)
    decode(model, 4)
    spent[:] = [0.0, 0]
    before = bandwidth()
    rate = decode(model, new_tokens)
    speed = (before + bandwidth()) / 2
    setattr(cpu, "_matmul_function", single)  # noqa: B010
    for cls, init in zip(several, inits, strict=True):
        setattr(cls, "__init__", init)  # noqa: B010
    packed = sum(
        layer._prepared.tensors[0].numel() for _, _, layer in quant_linears(model) if layer._prepared
    )
    forget_calls(model)
    calls = new_tokens + 1  # the pass over the prompt among them
    return {
        "token_ms": round(1e3 / rate, 2),
        "native_ms": round(spent[0] / calls * 1e3, 2),
        "native_calls": round(spent[1] / calls, 1),
        "packed_mb": round(packed / 1e6, 1),
        "read_ms": round(packed / speed * 1e3, 2),
        "other_ms": round(1e3 / rate - spent[0] / calls * 1e3, 2),
    }


def prepare(folder: Path, options: argparse.Namespace) -> tuple[Path, Path]:
    """The checkpoint and its GGUF file, made when they are missing."""
    name = f"llama-{options.layers}x2048-{options.bits}bit-head{options.head_bits}"
    checkpoint, gguf = folder / name, folder / f"{name}.gguf"
    if not (checkpoint / "config.json").is_file():
        write_random_quantized_llama(
            checkpoint,
            layers=options.layers,
            hidden=2048,
            intermediate=8192,
            heads=32,
            kv_heads=8,
            bits=options.bits,
            head_bits=options.head_bits,
        )
    if options.llama_python and not gguf.is_file():
        report = export_gguf(checkpoint, gguf)
        if report.rounded:
            raise SystemExit(f"llama.cpp has no block type for {sorted(report.rounded)[0]}; use 4 or 8 bits")
    return checkpoint, gguf


def measure(options: argparse.Namespace, checkpoint: Path, peer: Peer | None) -> dict[str, Any]:
    """All candidates in turn, a probe of memory beside each round."""
    probe = Probe()
    model = lightgptq.load(checkpoint, dtype=options.dtype, device="cpu")
    model.generation_config.eos_token_id = None
    tokens = torch.arange(1000, 1000 + PROMPT)
    logits = last_logits(model, tokens)
    candidates = {f"lightgptq_{mode}": ours(model, mode) for mode in options.modes.split(",")}
    if options.compiled:
        candidates |= {f"{name}_compiled": ours(model, name.split("_")[1], True) for name in list(candidates)}
    versions = {}
    if options.dense:
        candidates["transformers_dense"] = transformers_dense(model, logits, tokens)
    if peer is not None:
        candidates["llama_cpp"], versions["llama_cpp"] = llama_cpp(peer, logits, tokens.tolist())
    else:
        print("llama.cpp is not measured: give --llama-python an interpreter that has llama-cpp-python")
    rates: dict[str, dict[str, list[float]]] = {name: {"decode": [], "prefill": []} for name in candidates}
    bandwidth: list[float] = []
    for turn in range(-1, options.repeats):  # the first round warms up
        for name, candidate in candidates.items():
            time.sleep(SETTLE)
            probe.bytes_per_second()  # threads that sleep take milliseconds to come
            bandwidth.append(probe.bytes_per_second() / 1e9)
            rates[name]["decode"].append(candidate.decode(min(options.new_tokens, candidate.most_tokens)))
            rates[name]["prefill"].append(candidate.prefill(options.prompt))
        print("round", turn, {n: round(r["decode"][-1], 1) for n, r in rates.items()}, flush=True)
    undo = replaced(model, lambda layer: Stub(layer.out_features))
    compile_decoding(model, False)
    stub = [1e3 / decode(model, options.new_tokens) for _ in range(3)]
    undo()
    speed = lambda: sorted(probe.bytes_per_second() for _ in range(5))[2]  # noqa: E731
    return {
        "bits": options.bits,
        "head_bits": options.head_bits,
        "dtype": options.dtype,
        "layers": options.layers,
        "new_tokens": options.new_tokens,
        "prompt": options.prompt,
        "decode_tokens_s": {n: quantiles(r["decode"][1:], 3) for n, r in rates.items()},
        "prefill_tokens_s": {n: quantiles(r["prefill"][1:], 3) for n, r in rates.items()},
        "probe_gb_s": quantiles(bandwidth, 3),
        "stub_ms_per_token": round(sorted(stub)[1], 2),
        "token": {m: breakdown(model, m, options.new_tokens, speed) for m in options.modes.split(",")},
        "peers": versions,
    }


def main() -> None:
    """Measure, print and append one line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--head-bits", type=int, default=8)
    parser.add_argument("--modes", default="exact,int8")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--prompt", type=int, default=256)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--llama-python")
    parser.add_argument("--dense", action="store_true")
    parser.add_argument("--compiled", action="store_true")
    parser.add_argument("--no-append", action="store_true")
    options = parser.parse_args()
    checkpoint, gguf = prepare(options.folder, options)
    peer = None
    try:
        if options.llama_python:
            threads = str(torch.get_num_threads())
            peer = Peer("llama.cpp", options.llama_python, "peer_llamacpp.py", str(gguf), threads)
        line = measure(options, checkpoint, peer)
    except PeerError as error:
        raise SystemExit(str(error)) from error
    finally:
        if peer is not None:
            peer.close()
    print(line, flush=True)
    if not options.no_append:
        append("generate", line)


if __name__ == "__main__":
    main()
