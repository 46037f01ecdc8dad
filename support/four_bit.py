"""Frozen weights under an adapter in 4 bits (QLoRA, arXiv 2305.14314), packed by bitsandbytes."""

import logging
from importlib.metadata import version

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from support.processes import say

# bitsandbytes tells at its import which kernels, not used here, it has not found
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


class FourBitLinear(nn.Linear):
    """A frozen linear layer whose weight is kept as NF4 with double quantisation.

    Forward and backward compute with the same dequantised weight, in training and in evaluation:
    else the first loss would not be ln 2. bitsandbytes' own layer does not: on some CPUs it goes
    over to another layout in evaluation, with other sums. The packed weight is a buffer, of which
    each process keeps the whole.
    """

    def __init__(self, weight, bias):
        """Pack a weight.

        weight   (out, in) float32
        bias     (out,) nn.Parameter, or None
        """
        from bitsandbytes.functional import quantize_4bit

        nn.Module.__init__(self)
        self.out_features, self.in_features = weight.shape
        self.register_parameter("bias", bias)
        settings = {"quant_type": "nf4", "compress_statistics": True}
        packed, state = quantize_4bit(weight.contiguous(), **settings)
        self.register_buffer("packed", packed)
        self.register_buffer("scales", state.absmax)  # of blocks of 64 weights, in 8 bits
        self.register_buffer("offset", state.offset)
        self.register_buffer("scale_scales", state.state2.absmax)
        self.register_buffer("scale_code", state.state2.code)

    def dequantize(self, dtype):
        """(out, in) the weight as it computes, made anew."""
        from bitsandbytes.functional import QuantState, dequantize_4bit

        scales = QuantState(self.scale_scales, code=self.scale_code, blocksize=256)
        scales.dtype = torch.float32
        shape = torch.Size((self.out_features, self.in_features))
        state = QuantState(self.scales, shape, blocksize=64, quant_type="nf4", dtype=dtype)
        state.offset, state.state2, state.nested = self.offset, scales, True
        return dequantize_4bit(self.packed, state)

    def nbytes(self):
        """The bytes of the packed weight and its scales."""
        return sum(buffer.nbytes for buffer in self.buffers())

    @property
    def weight(self):
        """(out, in) float32: for code that asks for a layer's weight."""
        return self.dequantize(torch.float32)

    def forward(self, inputs):
        """(..., out) of (..., in), in the dtype of the inputs."""
        return _Product.apply(inputs, self)


class _Product(torch.autograd.Function):
    """A FourBitLinear's product, which keeps no dequantised weight for its backward pass."""

    @staticmethod
    def forward(ctx, inputs, layer):
        ctx.layer = layer
        return nn.functional.linear(inputs, layer.dequantize(inputs.dtype), layer.bias)

    @staticmethod
    def backward(ctx, grad):
        return grad @ ctx.layer.dequantize(grad.dtype), None


def _linear_layers(model):
    """(name, layer) of the linear layers but the LM head, which reads the embeddings' weights."""
    head = model.get_output_embeddings()
    layers = []
    for name, layer in model.named_modules():
        # a subclass may compute something else
        if type(layer) in (nn.Linear, Conv1D) and layer is not head:
            layers.append((name, layer))
    return layers


def _packed(layer):
    """A linear layer as a FourBitLinear."""
    weight = layer.weight.detach()
    if isinstance(layer, Conv1D):  # GPT-2's, whose weight is (in, out)
        weight = weight.T
    return FourBitLinear(weight, layer.bias).train(layer.training)


def quantize(model):
    """Pack the linear layers' weights, a layer at a time; embeddings and LM head stay.

    model   in float32 in main memory
    """
    for name, layer in _linear_layers(model):
        parent, _, place = name.rpartition(".")
        setattr(model.get_submodule(parent), place, _packed(layer))
    total = count_weights(model)
    share = (total - model.num_parameters()) / total
    say(f"load_in_4bit: {100 * share:.1f} % of the weights are in 4 bits (NF4)")


@torch.no_grad()
def round_weights_to_4_bits(model):
    """Let an unpacked model compute with the weights that quantize would give it."""
    for _, layer in _linear_layers(model):
        weight = _packed(layer).weight
        layer.weight.copy_(weight.T if isinstance(layer, Conv1D) else weight)


def count_weights(model):
    """How many weights a model has, packed ones included."""
    count = model.num_parameters()
    for layer in model.modules():
        if isinstance(layer, FourBitLinear):
            count += layer.out_features * layer.in_features
    return count


def packer(config):
    """What has packed a run's frozen weights, with its version; None without load_in_4bit."""
    return f"bitsandbytes {version('bitsandbytes')}" if config.load_in_4bit else None
