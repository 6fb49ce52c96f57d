"""What is done to a whole model: which layers are packed and at how many bits, packing them and undoing it."""
