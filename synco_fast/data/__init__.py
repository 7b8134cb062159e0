"""Image files in, augmented batches out, through DALI."""
