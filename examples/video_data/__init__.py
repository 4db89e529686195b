"""Videos: lists and shards of them, decoding, clips for training and views for evaluation."""
