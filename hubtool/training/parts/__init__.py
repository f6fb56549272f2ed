"""What is trained: low-rank layers, token vectors, cross-attention weights. A method puts such parts together."""
