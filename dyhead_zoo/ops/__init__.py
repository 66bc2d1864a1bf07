"""Functions on tensors: deformable convolution, box arithmetic."""

from dyhead_zoo.ops.deform_conv import modulated_deform_conv2d

__all__ = ["modulated_deform_conv2d"]
