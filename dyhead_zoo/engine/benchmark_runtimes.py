"""The deformable convolution in onnxruntime and OpenVINO, for comparison: kernel 3x3, padding 1, one thread, float32.

Each function takes x (1, C, H, W), offset (1, 18, Ho, Wo), mask (1, 9, Ho, Wo), weight (O, C, 3, 3) and the stride, and
gives a call without arguments that returns the output in a sequence or mapping.
"""

from __future__ import annotations

from importlib import import_module

import numpy as np
from torch import Tensor

from dyhead_zoo.engine.benchmark import Contestant


def onnxruntime(x: Tensor, offset: Tensor, mask: Tensor, weight: Tensor, stride: int) -> Contestant:
    """DeformConv of opset 19 by its CPU provider; needs onnx as well."""
    onnx, runtime = import_module("onnx"), import_module("onnxruntime")
    helper = onnx.helper
    feed = {"x": _array(x), "offset": _array(offset), "mask": _array(mask)}
    constants = {"weight": _array(weight), "bias": np.zeros(len(weight), np.float32)}
    node = helper.make_node(
        "DeformConv",
        ["x", "weight", "offset", "bias", "mask"],
        ["out"],
        kernel_shape=[3, 3],
        strides=[stride, stride],
        pads=[1, 1, 1, 1],
    )
    shapes = {name: list(array.shape) for name, array in feed.items()}
    out_shape = [len(x), len(weight), *offset.shape[2:]]
    graph = helper.make_graph(
        [node],
        "deform_conv",
        [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape) for name, shape in shapes.items()],
        [helper.make_tensor_value_info("out", onnx.TensorProto.FLOAT, out_shape)],
        [onnx.numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9)
    options = runtime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = runtime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return lambda: session.run(None, feed)


def openvino(x: Tensor, offset: Tensor, mask: Tensor, weight: Tensor, stride: int) -> Contestant:
    """DeformableConvolution-8 by its CPU device, which has no rule for ONNX's DeformConv."""
    runtime, opset8 = import_module("openvino"), import_module("openvino.opset8")
    feed = [_array(tensor) for tensor in (x, offset, mask)]
    data, offsets, masks = (opset8.parameter(array.shape, np.float32) for array in feed)
    node = opset8.deformable_convolution(
        data,
        offsets,
        opset8.constant(_array(weight)),
        [stride, stride],
        [1, 1],
        [1, 1],
        [1, 1],
        masks,
        bilinear_interpolation_pad=True,
    )
    settings = {"INFERENCE_NUM_THREADS": 1, "INFERENCE_PRECISION_HINT": "f32", "NUM_STREAMS": 1}
    model = runtime.Model([node], [data, offsets, masks])
    request = runtime.Core().compile_model(model, "CPU", settings).create_infer_request()
    return lambda: request.infer(feed)


def _array(tensor: Tensor) -> np.ndarray:
    return tensor.contiguous().numpy()
