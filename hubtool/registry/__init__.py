"""The catalogue. Knows no tensors."""
