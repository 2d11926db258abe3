"""What pruning took, given back in part: a short distillation from the whole model, which can be resumed."""
