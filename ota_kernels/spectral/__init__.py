"""Whole matrices: Gram matrices, eigenvectors, polar factors, and what merge methods make of them."""
