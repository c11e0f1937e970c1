"""Sources -> a prepared folder: find, cut into parts, read, split, tokenize, write shards and the manifest."""
