"""Training on diffusers and PEFT: one loop, made of small parts (data, objective, parameters, optimiser, checkpoints, validation)."""
