"""AWQ: activation-aware scales, searched against real GGUF types and folded.

The idea is that of Lin et al., "AWQ: Activation-aware Weight Quantization"
(2023): a linear map that sees inputs x may be replaced by W·s applied to x/s,
and 1/s folded into whatever made x. The float function is unchanged; the
rounding error is not. Here candidates are judged by what the very ggml type to
be written does to the outputs, through the second moment of the inputs.
"""
