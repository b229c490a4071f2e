"""Server for `bench.peers`: the 4-bit product of other tools, each in an environment that has it.

Arguments: TOOL (onnxruntime, openvino, zentorch or ggml), THREADS, and for ggml the folder of libggml.so.
Requests: {"do": "load", "file": PROBLEM.npz, "rotation": BYTES} with codes uint8 (out, in) around the middle 8, scales
float16 (out, in / 128) and x float32 (rows, in); {"do": "product", "rows": M, "file": Y.npy};
{"do": "time", "rows": M, "calls": N}.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

GROUP = 128
MIDDLE = 8


class OnnxRuntime:
    """MatMulNBits at accuracy level 4: activations in 8 bits, integer dot products."""

    def __init__(self, threads: int) -> None:
        import onnxruntime

        self.ort = onnxruntime
        self.threads = threads
        onnxruntime.set_global_thread_pool_sizes(threads, 1)
        self.version = f"onnxruntime {onnxruntime.__version__}"

    def weight(self, codes: np.ndarray, scales: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
        """A function x -> x @ W^T with a copy of the weight."""
        from onnx import TensorProto, helper

        out, inputs = codes.shape
        pairs = codes.reshape(out, inputs // GROUP, GROUP // 2, 2)
        packed = pairs[..., 0] | pairs[..., 1] << 4
        tensors = [
            helper.make_tensor("w", TensorProto.UINT8, packed.shape, packed.tobytes(), raw=True),
            helper.make_tensor(
                "s", TensorProto.FLOAT, (scales.size,), scales.astype(np.float32).tobytes(), raw=True
            ),
        ]
        attributes = {"K": inputs, "N": out, "bits": 4, "block_size": GROUP, "accuracy_level": 4}
        node = helper.make_node("MatMulNBits", ["x", "w", "s"], ["y"], domain="com.microsoft", **attributes)
        graph = helper.make_graph(
            [node],
            "product",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, ("rows", inputs))],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, ("rows", out))],
            tensors,
        )
        opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
        options = self.ort.SessionOptions()
        options.use_per_session_threads = False
        session = self.ort.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        return lambda x: session.run(None, {"x": x})[0]


class OpenVino:
    """A MatMul with a compressed constant, activations rounded to 8 bits per 128."""

    def __init__(self, threads: int) -> None:
        import openvino

        self.ov = openvino
        self.core = openvino.Core()
        self.settings = {
            "INFERENCE_NUM_THREADS": str(threads),
            "NUM_STREAMS": "1",
            "DYNAMIC_QUANTIZATION_GROUP_SIZE": str(GROUP),
            "INFERENCE_PRECISION_HINT": "f32",
        }
        self.version = f"openvino {openvino.__version__.split('-')[0]}"

    def weight(self, codes: np.ndarray, scales: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
        """A function x -> x @ W^T with a copy of the weight."""
        ov, ops = self.ov, self.ov.opset13
        out, inputs = codes.shape
        shape = [out, inputs // GROUP, GROUP]
        packed = (codes[:, 0::2] | codes[:, 1::2] << 4).astype(np.uint8)
        stored = ov.Tensor(packed.reshape(-1), ov.Shape(shape), ov.Type.u4)
        middle = ov.Tensor(np.array([MIDDLE], np.uint8), ov.Shape([1, 1, 1]), ov.Type.u4)
        weight = ops.convert(ops.constant(stored), "f16")
        weight = ops.subtract(weight, ops.convert(ops.constant(middle), "f16"))
        weight = ops.multiply(weight, ops.constant(scales.reshape(out, -1, 1).astype(np.float16)))
        weight = ops.reshape(weight, ops.constant(np.array([out, inputs])), False)
        x = ops.parameter([-1, inputs], ov.Type.f32)
        product = ops.matmul(x, ops.convert(weight, "f32"), False, True)
        compiled = self.core.compile_model(ov.Model([product], [x]), "CPU", self.settings)
        request = compiled.create_infer_request()

        def run(x: np.ndarray, kept: Any = (packed, stored, middle)) -> np.ndarray:
            request.set_input_tensor(ov.Tensor(x, True))
            request.infer()
            result: np.ndarray = request.get_output_tensor().data
            return result

        return run


class Zentorch:
    """AMD's ZenDNN behind torch: weight-only quantization, bfloat16 activations."""

    def __init__(self, threads: int) -> None:
        import torch
        import zentorch

        torch.set_num_threads(threads)
        self.torch = torch
        self.version = f"zentorch {zentorch.__version__}"

    def weight(self, codes: np.ndarray, scales: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
        """A function x -> x @ W^T with a copy of the weight."""
        torch = self.torch
        signed = torch.from_numpy(codes.astype(np.int8) - MIDDLE)
        packed = torch.ops.zentorch.zentorch_woq_repack_weight(signed).t()
        grid = torch.from_numpy(scales.astype(np.float32)).to(torch.bfloat16).t().contiguous()

        def run(x: Any) -> Any:
            return torch.ops.zentorch.zentorch_woq_linear(x, packed, grid, None)

        return run

    def activations(self, x: np.ndarray) -> Any:
        """x in the form that `weight`'s function takes."""
        return self.torch.from_numpy(x).to(self.torch.bfloat16)


class _InitParameters(ctypes.Structure):
    _fields_ = (("size", ctypes.c_size_t), ("memory", ctypes.c_void_p), ("no_alloc", ctypes.c_bool))


class Ggml:
    """ggml_mul_mat on Q4_0 blocks in the layout that llama.cpp repacks them to."""

    Q4_0, F32 = 2, 0

    def __init__(self, threads: int, folder: str) -> None:
        for name in ("libggml-base.so.0", "libggml-cpu.so.0", "libggml.so.0"):
            self.lib = ctypes.CDLL(str(Path(folder) / name), ctypes.RTLD_GLOBAL)
        lib, pointer, size = self.lib, ctypes.c_void_p, ctypes.c_int64
        signatures: dict[str, tuple[Any, list[Any]]] = {
            "ggml_init": (pointer, [_InitParameters]),
            "ggml_new_tensor_2d": (pointer, [pointer, ctypes.c_int, size, size]),
            "ggml_mul_mat": (pointer, [pointer, pointer, pointer]),
            "ggml_new_graph": (pointer, [pointer]),
            "ggml_build_forward_expand": (None, [pointer, pointer]),
            "ggml_get_data": (pointer, [pointer]),
            "ggml_backend_cpu_init": (pointer, []),
            "ggml_backend_cpu_reg": (pointer, []),
            "ggml_backend_cpu_buffer_type": (pointer, []),
            "ggml_backend_cpu_set_n_threads": (None, [pointer, ctypes.c_int]),
            "ggml_backend_reg_dev_get": (pointer, [pointer, ctypes.c_size_t]),
            "ggml_backend_reg_get_proc_address": (pointer, [pointer, ctypes.c_char_p]),
            "ggml_backend_buft_name": (ctypes.c_char_p, [pointer]),
            "ggml_backend_alloc_ctx_tensors_from_buft": (pointer, [pointer, pointer]),
            "ggml_backend_tensor_set": (None, [pointer, pointer, ctypes.c_size_t, ctypes.c_size_t]),
            "ggml_backend_graph_compute": (ctypes.c_int, [pointer, pointer]),
        }
        for name, (result, arguments) in signatures.items():
            function = getattr(lib, name)
            function.restype, function.argtypes = result, arguments
        self.backend = lib.ggml_backend_cpu_init()
        lib.ggml_backend_cpu_set_n_threads(self.backend, threads)
        self.silent = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(lambda *_: None)
        lib.ggml_log_set(self.silent, None)
        self.repacked = self._repacking_buffers()
        self.version = "ggml Q4_0, repacked"

    def _repacking_buffers(self) -> int:
        registry = self.lib.ggml_backend_cpu_reg()
        address = self.lib.ggml_backend_reg_get_proc_address(registry, b"ggml_backend_dev_get_extra_bufts")
        kinds = ctypes.CFUNCTYPE(ctypes.POINTER(ctypes.c_void_p), ctypes.c_void_p)(address)(
            self.lib.ggml_backend_reg_dev_get(registry, 0)
        )
        index = 0
        while kinds[index]:
            kind = int(kinds[index])
            if self.lib.ggml_backend_buft_name(kind) == b"CPU_REPACK":
                return kind
            index += 1
        raise SystemExit("this ggml has no CPU_REPACK buffers")

    def _context(self) -> int:
        return int(self.lib.ggml_init(_InitParameters(1 << 20, None, True)))

    def weight(self, codes: np.ndarray, scales: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
        """A function x -> x @ W^T with a copy of the weight."""
        lib, (out, inputs) = self.lib, codes.shape
        blocks = codes.reshape(out, inputs // 32, 2, 16)
        data = np.empty((out, inputs // 32, 18), np.uint8)
        data[..., :2] = np.repeat(scales, GROUP // 32, 1)[..., None].view(np.uint8)
        data[..., 2:] = blocks[:, :, 0] | blocks[:, :, 1] << 4
        context = self._context()
        weight = lib.ggml_new_tensor_2d(context, self.Q4_0, inputs, out)
        lib.ggml_backend_alloc_ctx_tensors_from_buft(context, self.repacked)
        lib.ggml_backend_tensor_set(weight, data.ctypes.data, 0, data.nbytes)
        graphs: dict[int, tuple[int, int, int]] = {}

        def graph(rows: int) -> tuple[int, int, int]:
            inside = self._context()
            x = lib.ggml_new_tensor_2d(inside, self.F32, inputs, rows)
            y = lib.ggml_mul_mat(inside, weight, x)
            made = lib.ggml_new_graph(inside)
            lib.ggml_build_forward_expand(made, y)
            lib.ggml_backend_alloc_ctx_tensors_from_buft(inside, lib.ggml_backend_cpu_buffer_type())
            return made, lib.ggml_get_data(x), lib.ggml_get_data(y)

        def run(x: np.ndarray) -> np.ndarray:
            rows = len(x)
            if rows not in graphs:
                graphs[rows] = graph(rows)
            made, to, result = graphs[rows]
            ctypes.memmove(to, x.ctypes.data, x.nbytes)
            if lib.ggml_backend_graph_compute(self.backend, made) != 0:
                raise RuntimeError("ggml_backend_graph_compute failed")
            floats = ctypes.cast(result, ctypes.POINTER(ctypes.c_float))
            return np.ctypeslib.as_array(floats, (rows, out))

        return run


class Server:
    """Answers requests for one tool."""

    def __init__(self, tool: Any) -> None:
        self.tool = tool
        self.copies: list[Callable[[np.ndarray], np.ndarray]] = []
        self.turn = 0

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """One request."""
        if request["do"] == "load":
            problem = np.load(request["file"])
            self.x = problem["x"]
            self.copies = []  # the ones of the problem before are freed first
            count = max(1, int(request["rotation"] // (problem["codes"].size / 2)))
            self.copies = [self.tool.weight(problem["codes"], problem["scales"]) for _ in range(count)]
            return {"version": self.tool.version}
        x = np.ascontiguousarray(self.x[: request["rows"]])
        if hasattr(self.tool, "activations"):
            x = self.tool.activations(x)
        if request["do"] == "product":
            for copy in self.copies:  # some tools repack a weight when they first meet this number of rows
                y = copy(x)
            np.save(request["file"], y if isinstance(y, np.ndarray) else y.float().numpy())
            return {}
        seconds = []
        for _ in range(request["calls"]):
            self.turn = (self.turn + 1) % len(self.copies)
            run = self.copies[self.turn]
            started = time.perf_counter()
            run(x)
            seconds.append(time.perf_counter() - started)
        return {"seconds": seconds}


def main() -> None:
    """Answer until the input ends. What the tool prints goes to the standard error."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    name, threads = sys.argv[1], int(sys.argv[2])
    try:
        tools: dict[str, Callable[[], Any]] = {
            "onnxruntime": lambda: OnnxRuntime(threads),
            "openvino": lambda: OpenVino(threads),
            "zentorch": lambda: Zentorch(threads),
            "ggml": lambda: Ggml(threads, sys.argv[3]),
        }
        server = Server(tools[name]())
    except (ImportError, OSError) as error:
        print(json.dumps({"error": f"cannot be loaded: {error}"}), file=answers, flush=True)
        return
    for line in sys.stdin:
        print(json.dumps(server.answer(json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    main()
