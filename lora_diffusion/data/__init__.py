"""From a folder of pictures and captions to batches: scan, buckets, pixels, caches, order. Knows no model."""
