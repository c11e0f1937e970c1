"""C for what torch does slowly on a CPU; each function has its equal in torch, for where it was not compiled."""
