"""How good are the images: distances between sets of them, on plain tensors."""
