"""Sources -> a prepared corpus: find, read, split, tokenize, write."""
