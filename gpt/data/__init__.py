"""Sources -> a prepared corpus -> batches: preparation, tokenizers, shards, the order of training, the data loader."""
