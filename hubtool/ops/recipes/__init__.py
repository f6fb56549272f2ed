"""What recipes are made with: the check against their schema, texts that hold them, and the merging of what the inputs said."""
