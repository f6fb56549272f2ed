"""What merging checkpoints is made of: the inputs by canonical names, the strengths of each module, the merged tensors."""
