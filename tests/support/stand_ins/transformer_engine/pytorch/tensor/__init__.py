class QuantizedTensor:
    """No tensor of a test is quantized."""
