"""From a corpus to batches: readers, tokenizers, token shards, the order of windows, the loader."""
