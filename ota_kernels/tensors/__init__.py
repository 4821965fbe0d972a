"""With what kernels work, and what comes back."""
