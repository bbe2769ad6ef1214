"""Second-order information for everyday PyTorch."""
