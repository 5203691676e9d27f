"""Read the weights of a `.tflite` file back: what is really in it, integer codes included."""

import dataclasses

import numpy as np

_OPERATIONS = ("FULLY_CONNECTED", "CONV_2D", "DEPTHWISE_CONV_2D")
# TFLite tensor type -> (bits, signed integer), by name in the schema
_BITS = {"INT2": 2, "INT4": 4, "INT8": 8}


@dataclasses.dataclass(frozen=True)
class LiteRTWeight:
    """The weight matrix of one operation.

    Attributes:
        operation: "FULLY_CONNECTED", "CONV_2D" or "DEPTHWISE_CONV_2D".
        name: name of the operation's output tensor. It contains the layer's path, except where the operation gives an
            output of the whole graph, which the converter names after the signature.
        tensor: name of the weight tensor, which the converter also takes from the layer where it can.
        values: float32 `[outputs, inputs]` as the runtime sees them (dequantized where they are integers).
        codes: int8 `[outputs, inputs]`, or None for a float matrix.
        scale: float32 `[outputs]` or `[1]`, or None.
        bits: 2, 4, 8, or 32 for float.
        shape: shape of the weight tensor in the file.
    """

    operation: str
    name: str
    tensor: str
    values: np.ndarray
    codes: np.ndarray | None
    scale: np.ndarray | None
    bits: int
    shape: tuple


def read_litert_weights(path):
    """Return the `LiteRTWeight` of every matrix product and convolution of a `.tflite` file, in execution order.

    The file is parsed with the schema classes of `ai_edge_litert`. Convolution kernels are given as matrices: outputs
    by taps and inputs, depthwise ones channels by taps.

    Raises:
        ImportError: `ai-edge-litert` is not installed.
    """
    from ai_edge_litert import schema_py_generated as schema

    with open(path, "rb") as file:
        content = file.read()
    model = schema.ModelT.InitFromObj(schema.Model.GetRootAsModel(content, 0))
    type_names = {value: name for name, value in vars(schema.TensorType).items() if isinstance(value, int)}
    operations = {getattr(schema.BuiltinOperator, name): name for name in _OPERATIONS}
    graph = model.subgraphs[0]
    found = []
    for operation in graph.operators:
        code = model.operatorCodes[operation.opcodeIndex]
        kind = operations.get(max(code.builtinCode, code.deprecatedBuiltinCode))
        if kind is None:
            continue
        tensor = graph.tensors[operation.inputs[1]]
        data = _buffer(model.buffers[tensor.buffer], content)
        if data is None:
            continue  # a product of two activations
        name = graph.tensors[operation.outputs[0]].name.decode("utf-8")
        found.append(_weight(kind, name, tensor, data, type_names[tensor.type]))
    return found


def _buffer(buffer, content):
    """Constants lie inside the flatbuffer, or behind it at an offset; activations have neither."""
    if buffer.data is not None:
        return np.asarray(buffer.data, dtype=np.uint8)
    if buffer.offset > 1:
        return np.frombuffer(content, dtype=np.uint8, count=buffer.size, offset=buffer.offset)
    return None


def _weight(operation, name, tensor, data, type_name):
    shape = tuple(int(size) for size in tensor.shape)
    tensor_name = tensor.name.decode("utf-8")
    if type_name == "FLOAT32":
        values = _matrix(operation, data.view(np.float32).reshape(shape))
        return LiteRTWeight(operation, name, tensor_name, values, None, None, 32, shape)
    if type_name not in _BITS:
        raise ValueError(f"Weights of {name!r} have type {type_name}; expected FLOAT32, INT8, INT4 or INT2.")
    bits = _BITS[type_name]
    codes = _matrix(operation, _unpack_signed(data, bits, int(np.prod(shape))).reshape(shape))
    scale = np.asarray(tensor.quantization.scale, dtype=np.float32)
    return LiteRTWeight(operation, name, tensor_name, codes * scale[:, None], codes, scale, bits, shape)


def _matrix(operation, tensor):
    """TFLite keeps the outputs first, except that depthwise kernels are `[1, taps, taps, channels]`."""
    if operation == "DEPTHWISE_CONV_2D":
        return np.ascontiguousarray(tensor.reshape(-1, tensor.shape[-1]).T)
    return tensor.reshape(len(tensor), -1)


def _unpack_signed(data, bits, count):
    """TFLite packs narrow integers from the low bits of each byte upwards, in two's complement."""
    if bits == 8:
        return data.view(np.int8)[:count]
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    fields = (data[:, None] >> shifts) & ((1 << bits) - 1)
    fields = fields.reshape(-1)[:count].astype(np.int8)
    return np.where(fields >= 1 << (bits - 1), fields - (1 << bits), fields).astype(np.int8)
