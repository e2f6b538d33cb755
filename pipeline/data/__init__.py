"""Files to samples and back: manifests, folds, readers, writers, checks, atomic writes."""
